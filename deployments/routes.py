"""The routes: clipfleet's own, and those that answer as other services do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Path, Query
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from clipfleet.errors import ClipfleetError, InvalidRequest, UnsupportedDimensions
from clipfleet.vectors import rank
from deployments import infinity, schemas, weaviate, web
from deployments.answers import ITEMS, KEYED, OPEN, answers
from deployments.docs_page import add_schemas, render
from deployments.encoder import EncodedText
from deployments.gate import add_error_handlers
from deployments.haproxy_wrapper import IMAGES_PATH
from deployments.inputs import Input, check_counts, read_items
from deployments.pipeline import Outcome
from deployments.requests import Asked, Requests
from deployments.responses import NPY, entry, error_response, json_response, npy_response, vector
from deployments.search import SearchRoute
from deployments.stats import StatsRoute


def make_app(
    requests: Requests, search: SearchRoute, *, asks_keys: bool, page: bool, show_drop_ins: bool = False
) -> FastAPI:
    """The application with every route. Its document has those of other services where `show_drop_ins`."""
    app = FastAPI(
        title="clipfleet",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Serve's own spans are the request's, and the only ones that its sampling decides about.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    add_error_handlers(app)
    routes = Routes(requests, search)
    routes.add(app)
    infinity.add_routes(app, requests, routes.embed_json, show=show_drop_ins)
    weaviate.add_routes(app, requests, show=show_drop_ins)
    if page:
        web.add_routes(app)
    add_schemas(app, asks_keys=asks_keys)
    app.add_api_route(
        "/docs", lambda: HTMLResponse(render(app.openapi())), methods=["GET", "HEAD"], include_in_schema=False
    )
    return app


class Routes:
    """clipfleet's own routes."""

    def __init__(self, requests: Requests, search: SearchRoute) -> None:
        self._requests = requests
        self._search = search
        self._stats = StatsRoute(requests, search=search.is_on)

    def add(self, app: FastAPI) -> None:
        """Add them to an application."""

        def route(method: str, path: str, handler: Any, good: type[schemas.Wire], statuses: tuple[int, ...]) -> None:
            documented = answers(good, statuses)
            app.add_api_route(path, handler, methods=[method], response_model=None, responses=documented)
            if method == "GET":  # what load balancers and uptime checks ask
                app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)

        route("POST", "/v1/embeddings", self.embeddings, schemas.EmbeddingsResponse, ITEMS)
        route("POST", IMAGES_PATH, self.image_embeddings, schemas.EmbeddingsResponse, ITEMS)
        route("POST", "/v1/rank", self.rank, schemas.RankResponse, ITEMS)
        if self._search.is_on:
            route("POST", "/v1/search", self._search.search, schemas.SearchResponse, ITEMS)
        else:  # it says what is missing
            app.add_api_route("/v1/search", self._search.search, methods=["POST"], include_in_schema=False)
        route("GET", "/v1/models", self.models, schemas.ModelList, KEYED)
        route("GET", "/v1/models/{model:path}", self.model, schemas.Model, (*KEYED, 404))
        route("GET", "/v1/stats", self._stats.stats, schemas.Stats, KEYED)
        route("GET", "/healthz", self.healthz, schemas.Health, OPEN)
        route("GET", "/readyz", self.readyz, schemas.Health, OPEN)

    async def embeddings(self, request: Request) -> Response:
        """Embed texts, images, or a list that mixes both, in order."""
        return await self.embed_json(request, schemas.EmbeddingsRequest)

    async def embed_json(self, request: Request, kind: type[schemas.EmbeddingsRequest]) -> Response:
        """Answer a request of that kind."""
        requests = self._requests
        with requests.asked(request) as asked:
            wanted = await requests.read_json(asked, kind)
            model = requests.check_model(wanted.model)
            if wanted.dimensions not in (None, model["dimension"]):
                raise UnsupportedDimensions(
                    f"{wanted.dimensions} dimensions were asked for, {model['id']} has {model['dimension']}; "
                    "send that number or leave `dimensions` out",
                    param="dimensions",
                )
            if wanted.dtype == "float16" and wanted.encoding_format == "float":
                raise InvalidRequest("dtype float16 needs encoding_format base64", param="dtype")
            items = wanted.input if isinstance(wanted.input, list) else [wanted.input]
            read = read_items(items, wanted.modality, requests.limits, "input", urls=requests.urls)
            options = schemas.Options.model_validate(wanted.model_dump(include=set(schemas.Options.model_fields)))
            del wanted, items  # the images once more, as base64
            model, outcomes = await requests.embed(asked, read)
        return _failed(outcomes, options, "input") or _embeddings(outcomes, options, model)

    async def image_embeddings(self, request: Request, options: Annotated[schemas.Options, Query()]) -> Response:
        """Embed raw image bytes, or the files of a multipart body; `Accept: application/x-npy` gives one .npy."""
        requests = self._requests
        with requests.asked(request) as asked:
            npy = NPY in request.headers.get("accept", "")
            if options.dtype == "float16" and options.encoding_format == "float" and not npy:
                raise InvalidRequest("dtype float16 needs encoding_format base64 or .npy", param="dtype")
            requests.check_model(options.model)
            requests.admission.check_items(1, 0, asked.seconds_left, asked.key)  # before the body is read
            images = await self._read_images(asked)
            check_counts(len(images), 0, requests.limits, "files")
            served, outcomes = await requests.embed(asked, list[Input](images))
        failed = _failed(outcomes, options, "files")
        return failed or (npy_response if npy else _embeddings)(outcomes, options, served)

    async def _read_images(self, asked: Asked) -> list[bytes]:
        body = self._requests.body(asked)
        kind = asked.request.headers.get("content-type", "").lower()
        if kind.startswith("multipart/form-data"):
            return await self._requests.in_time(asked, body.read_files())
        if kind.startswith("image/") or kind.startswith("application/octet-stream"):
            return [await self._requests.in_time(asked, body.read())]
        raise InvalidRequest("Content-Type must be image/*, application/octet-stream or multipart/form-data")

    async def rank(self, request: Request) -> Response:
        """Rank candidates (texts, images, or both) by their similarity to a query."""
        requests = self._requests
        with requests.asked(request) as asked:
            wanted = await requests.read_json(asked, schemas.RankRequest)
            requests.check_model(wanted.model)
            read = [
                *read_items([wanted.query], "text", requests.limits, "query", urls=requests.urls),
                *read_items(wanted.candidates, "text", requests.limits, "candidates", urls=requests.urls),
            ]
            del wanted
            model, outcomes = await requests.embed(asked, read)
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, ClipfleetError):
                return error_response(outcome, "query" if number == 0 else f"candidates[{number - 1}]")
        vectors = np.stack([vector(outcome) for outcome in outcomes])  # (1 + n, d)
        ranked = rank(vectors[0], vectors[1:], logit_scale=model["logit_scale"], logit_bias=model["logit_bias"])
        return json_response(
            {
                "object": "list",
                "model": model["id"],
                "fingerprint": model["fingerprint"],
                "results": [asdict(result) for result in ranked],
            },
            fingerprint=model["fingerprint"],
        )

    async def models(self) -> Response:
        """The served model, as a list of one."""
        return json_response({"object": "list", "data": [self._public_model()]})

    async def model(
        self, model: Annotated[str, Path(description="The served model's id, slashes included.")]
    ) -> Response:
        """The served model."""
        self._requests.check_model(model)
        return json_response(self._public_model())

    async def healthz(self) -> Response:
        """Whether the ingress is alive."""
        return json_response({"status": "alive", "deployments": self._requests.health.deployments()})

    async def readyz(self) -> Response:
        """Whether every deployment has worked within the last 10 s."""
        health = self._requests.health
        ready = health.ready()
        body = {"status": "ready" if ready else "not ready", "deployments": health.deployments()}
        return json_response(body, 200 if ready else 503)

    def _public_model(self) -> dict[str, Any]:
        return schemas.public_model(self._requests.check_model())


def _failed(outcomes: list[Outcome], options: schemas.Options, name: str) -> Response | None:
    """The answer to a request of which one item failed, where that decides it."""
    if options.on_error == "fail":
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, ClipfleetError):
                return error_response(outcome, f"{name}[{number}]")
    return None


def _embeddings(outcomes: list[Outcome], options: schemas.Options, model: dict[str, Any]) -> Response:
    tokens = sum(outcome.tokens for outcome in outcomes if isinstance(outcome, EncodedText))
    return json_response(
        {
            "object": "list",
            "data": [entry(number, outcome, options) for number, outcome in enumerate(outcomes)],
            "model": model["id"],
            "fingerprint": model["fingerprint"],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        },
        fingerprint=model["fingerprint"],
    )
