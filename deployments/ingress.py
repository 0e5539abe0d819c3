"""The HTTP ingress: routes, and nothing that touches pixels."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from clipfleet.errors import (
    BodyTooLarge,
    ClipfleetError,
    DeadlineExceeded,
    InputError,
    InvalidRequest,
    ModelNotFound,
    ServiceError,
    Unavailable,
    UnsupportedDimensions,
)
from clipfleet.keys import KeyRing
from clipfleet.settings import ServiceSettings
from clipfleet.vectors import DType, rank, to_base64, to_npy
from deployments import memory, prefixes, schemas
from deployments.admission import Admission
from deployments.answers import ITEMS, KEYED, OPEN, answers
from deployments.bodies import Body, parse_json
from deployments.cache import VectorCache
from deployments.docs_page import add_schemas, render
from deployments.encoder import EncodedText
from deployments.fetching import Fetcher
from deployments.gate import FINGERPRINT_HEADER, KEY_NAME, Gate, add_error_handlers, read_deadline, with_cors
from deployments.health import Health
from deployments.inputs import ImageUrl, Input, check_counts, read_items
from deployments.own_config import check_own_scaling
from deployments.pipeline import CheckpointChanged, Outcome, Pipeline, seconds_left
from deployments.responses import count_error, error_body, error_response, json_response

NPY = "application/x-npy"
ERRORS_HEADER = "X-Clipfleet-Errors"


@serve.ingress()
class Ingress:
    """Validates, admits, spreads a request's items over the deployments, and words the answer."""

    def __init__(
        self,
        settings: ServiceSettings,
        decoder: DeploymentHandle,
        image_encoder: DeploymentHandle,
        text_encoder: DeploymentHandle,
    ) -> None:
        check_own_scaling()
        memory.return_large_blocks()
        prefixes.accept_any()
        self._settings = settings
        self._limits = settings.limits
        self._admission = Admission(settings.limits)
        self._cache = VectorCache(settings.cache)
        self._pipeline = Pipeline(decoder, image_encoder, text_encoder)
        self._handles = {"ImageDecoder": decoder, "ImageEncoder": image_encoder, "TextEncoder": text_encoder}
        self._urls = settings.image_urls.enabled
        self._fetcher: Fetcher | None = None
        self._health: Health | None = None
        self._gate: Gate | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        if self._urls:
            self._fetcher = Fetcher(self._settings.image_urls, self._limits.image_bytes)
        self._health = Health(self._handles)
        memory.collect_rarely()
        keys = KeyRing(self._settings.api_keys, self._settings.api_keys_file)
        self._gate = Gate(self._routes(asks_keys=keys.asks), keys=keys, fingerprint=self._fingerprint)
        return with_cors(self._gate, self._settings.cors_origins, (FINGERPRINT_HEADER, ERRORS_HEADER))

    async def drain(self) -> None:
        """Refuse newcomers, and wait until every request is answered."""
        if self._gate is not None:
            await self._gate.drain()

    async def quiet_seconds(self) -> float:
        """Seconds since the last request."""
        return self._gate.quiet_seconds() if self._gate is not None else 0.0

    def _routes(self, *, asks_keys: bool) -> FastAPI:
        app = FastAPI(title="clipfleet", docs_url=None, redoc_url=None, redirect_slashes=False)
        add_error_handlers(app)

        def route(method: str, path: str, handler: Any, good: type[schemas.Wire], statuses: tuple[int, ...]) -> None:
            documented = answers(good, statuses)
            app.add_api_route(path, handler, methods=[method], response_model=None, responses=documented)
            if method == "GET":  # what load balancers and uptime checks ask
                app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)

        route("POST", "/v1/embeddings", self.embeddings, schemas.EmbeddingsResponse, ITEMS)
        route("POST", "/v1/embeddings/images", self.image_embeddings, schemas.EmbeddingsResponse, ITEMS)
        route("POST", "/v1/rank", self.rank, schemas.RankResponse, ITEMS)
        route("GET", "/v1/models", self.models, schemas.ModelList, KEYED)
        route("GET", "/v1/models/{model:path}", self.model, schemas.Model, (*KEYED, 404))
        route("GET", "/healthz", self.healthz, schemas.Health, OPEN)
        route("GET", "/readyz", self.readyz, schemas.Health, OPEN)
        add_schemas(app, asks_keys=asks_keys)
        app.add_api_route(
            "/docs", lambda: HTMLResponse(render(app.openapi())), methods=["GET", "HEAD"], include_in_schema=False
        )
        return app

    # --- routes

    async def embeddings(self, request: Request) -> Response:
        """Embed texts, images, or a list that mixes both, in order."""
        deadline = read_deadline(request, self._limits.deadline_s)
        key = _key(request)
        self._admission.check_key(key, 1)  # before the body is read
        with ExitStack() as held:
            body = await self._read(Body(request, self._limits, self._admission, held, key).read(), deadline)
            wanted = parse_json(body, schemas.EmbeddingsRequest, self._limits)
            size = len(body)
            del body
            model = self._check_model(wanted.model)
            if wanted.dimensions not in (None, model["dimension"]):
                raise UnsupportedDimensions(
                    f"{wanted.dimensions} dimensions were asked for, {model['id']} has {model['dimension']}; "
                    "send that number or leave `dimensions` out",
                    param="dimensions",
                )
            if wanted.dtype == "float16" and wanted.encoding_format == "float":
                raise InvalidRequest("dtype float16 needs encoding_format base64", param="dtype")
            items = wanted.input if isinstance(wanted.input, list) else [wanted.input]
            read = read_items(items, wanted.modality, self._limits, "input", urls=self._urls)
            options = schemas.Options.model_validate(wanted.model_dump(include=set(schemas.Options.model_fields)))
            del wanted, items  # the images once more, as base64
            inputs = await self._fetched(read, deadline, held, size, key)
            return await self._answer(inputs, options, deadline, "input", key, npy=False)

    async def image_embeddings(
        self,
        request: Request,
        model: str | None = None,
        encoding_format: schemas.EncodingFormat = "float",
        dtype: DType = "float32",
        on_error: schemas.OnError = "fail",
    ) -> Response:
        """Embed raw image bytes, or the files of a multipart body; `Accept: application/x-npy` gives one .npy."""
        deadline = read_deadline(request, self._limits.deadline_s)
        npy = NPY in request.headers.get("accept", "")
        options = schemas.Options(model=model, encoding_format=encoding_format, dtype=dtype, on_error=on_error)
        if dtype == "float16" and encoding_format == "float" and not npy:
            raise InvalidRequest("dtype float16 needs encoding_format base64 or .npy", param="dtype")
        self._check_model(model)
        key = _key(request)
        self._admission.check_items(1, 0, seconds_left(deadline), key)
        with ExitStack() as held:
            body = Body(request, self._limits, self._admission, held, key)
            kind = request.headers.get("content-type", "").lower()
            if kind.startswith("multipart/form-data"):
                images = await self._read(body.read_files(), deadline)
            elif kind.startswith("image/") or kind.startswith("application/octet-stream"):
                images = [await self._read(body.read(), deadline)]
            else:
                raise InvalidRequest("Content-Type must be image/*, application/octet-stream or multipart/form-data")
            check_counts(len(images), 0, self._limits, "files")
            return await self._answer(list[Input](images), options, deadline, "files", key, npy=npy)

    async def rank(self, request: Request) -> Response:
        """Rank candidates (texts, images, or both) by their similarity to a query."""
        deadline = read_deadline(request, self._limits.deadline_s)
        key = _key(request)
        self._admission.check_key(key, 1)  # before the body is read
        with ExitStack() as held:
            body = await self._read(Body(request, self._limits, self._admission, held, key).read(), deadline)
            wanted = parse_json(body, schemas.RankRequest, self._limits)
            size = len(body)
            del body
            model = self._check_model(wanted.model)
            read = [
                *read_items([wanted.query], "text", self._limits, "query", urls=self._urls),
                *read_items(wanted.candidates, "text", self._limits, "candidates", urls=self._urls),
            ]
            del wanted
            inputs = await self._fetched(read, deadline, held, size, key)
            outcomes = await self._embed(inputs, deadline, model["fingerprint"], key)
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, ClipfleetError):
                return error_response(outcome, "query" if number == 0 else f"candidates[{number - 1}]")
        vectors = np.stack([_vector(outcome) for outcome in outcomes])  # (1 + n, d)
        ranked = rank(vectors[0], vectors[1:], logit_scale=model["logit_scale"], logit_bias=model["logit_bias"])
        return json_response(
            {
                "object": "list",
                "model": model["id"],
                "fingerprint": model["fingerprint"],
                "results": [asdict(result) for result in ranked],
            }
        )

    async def models(self) -> Response:
        """The served model, as a list of one."""
        return json_response({"object": "list", "data": [self._public_model()]})

    async def model(self, model: str) -> Response:
        """The served model."""
        self._check_model(model)
        return json_response(self._public_model())

    async def healthz(self) -> Response:
        """Whether the ingress is alive."""
        return json_response({"status": "alive", "deployments": self._watch().deployments()})

    async def readyz(self) -> Response:
        """Whether every deployment has worked within the last 10 s."""
        ready = self._watch().ready()
        body = {"status": "ready" if ready else "not ready", "deployments": self._watch().deployments()}
        return json_response(body, 200 if ready else 503)

    # --- what they share

    def _watch(self) -> Health:
        assert self._health is not None  # made before the first request
        return self._health

    def _fingerprint(self) -> str | None:
        model = self._watch().model
        return model["fingerprint"] if model else None

    def _check_model(self, wanted: str | None) -> dict[str, Any]:
        model = self._watch().model
        if model is None:
            raise Unavailable("the encoders are still starting", retry_after=2)
        if wanted is not None and wanted != model["id"]:
            raise ModelNotFound(f"model {wanted[:200]!r} is not served here; served is {model['id']!r}", param="model")
        return model

    def _public_model(self) -> dict[str, Any]:
        model = self._check_model(None)
        return {"object": "model", **{name: model[name] for name in schemas.Model.model_fields if name != "object"}}

    async def _read(self, reading: Any, deadline: float) -> Any:
        try:
            async with asyncio.timeout(seconds_left(deadline)):
                return await reading
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the whole request had arrived") from None

    async def _fetched(
        self, items: Sequence[Input | ImageUrl], deadline: float, held: ExitStack, own: int, key: str | None
    ) -> list[Input]:
        """The items with each address replaced by its image, or by what was wrong with it; the request holds `own` bytes."""
        addresses = sum(isinstance(item, ImageUrl) for item in items)
        if not addresses:
            return [item for item in items if not isinstance(item, ImageUrl)]
        fetched, most = 0, self._limits.body_bytes

        async def fetch(address: str) -> Input:
            nonlocal fetched
            assert self._fetcher is not None  # otherwise read_items gives no addresses
            try:
                content = await self._fetcher.fetch(address, seconds_left(deadline), key)
            except InputError as error:
                return error
            if fetched + len(content) > most:
                raise BodyTooLarge(
                    f"the images of the request's addresses have over {most:,} bytes, which is the limit of a body; "
                    "send fewer a request"
                )
            held.enter_context(self._admission.hold_bytes(len(content), own + fetched, key))
            fetched += len(content)
            return content

        try:
            with self._admission.hold_key(key, addresses):
                async with asyncio.TaskGroup() as group:  # what is refused ends its siblings
                    found = [
                        group.create_task(fetch(item.address)) if isinstance(item, ImageUrl) else item for item in items
                    ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [item.result() if isinstance(item, asyncio.Task) else item for item in found]

    async def _embed(
        self, inputs: Sequence[Input], deadline: float, fingerprint: str, key: str | None
    ) -> list[Outcome]:
        """One outcome an input, in order: remembered or computed. `key` is the name of the API key that asked."""
        known = self._cache.find(inputs, fingerprint)
        missing = [item for number, item in enumerate(inputs) if number not in known]
        computed = await self._compute(missing, deadline, fingerprint, key) if missing else []
        self._cache.keep(missing, computed, fingerprint)
        rest = iter(computed)
        return [known[number] if number in known else next(rest) for number in range(len(inputs))]

    async def _compute(
        self, inputs: Sequence[Input], deadline: float, fingerprint: str, key: str | None
    ) -> list[Outcome]:
        images = sum(isinstance(item, bytes) for item in inputs)
        texts = sum(isinstance(item, str) for item in inputs)
        with self._admission.hold_items(images, texts, seconds_left(deadline), key):
            try:
                async with asyncio.timeout(seconds_left(deadline)):
                    outcomes = await self._pipeline.embed(inputs, deadline, fingerprint)
            except CheckpointChanged:
                self._watch().forget_model()
                raise
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed before every item had its vector") from None
        if any(isinstance(outcome, EncodedText) for outcome in outcomes):
            self._watch().succeeded("TextEncoder")
        if any(isinstance(outcome, np.ndarray) for outcome in outcomes):
            self._watch().succeeded("ImageDecoder", "ImageEncoder")
        for outcome in outcomes:
            if isinstance(outcome, ServiceError):  # the model or the deadline failed, not the item
                raise outcome
        return outcomes

    async def _answer(
        self,
        inputs: Sequence[Input],
        options: schemas.Options,
        deadline: float,
        name: str,
        key: str | None,
        *,
        npy: bool,
    ) -> Response:
        model = self._check_model(None)
        outcomes = await self._embed(inputs, deadline, model["fingerprint"], key)
        if options.on_error == "fail":
            for number, outcome in enumerate(outcomes):
                if isinstance(outcome, ClipfleetError):
                    return error_response(outcome, f"{name}[{number}]")
        if npy:
            return _npy(outcomes, options.dtype, model)
        tokens = sum(outcome.tokens for outcome in outcomes if isinstance(outcome, EncodedText))
        return json_response(
            {
                "object": "list",
                "data": [_entry(number, outcome, options) for number, outcome in enumerate(outcomes)],
                "model": model["id"],
                "fingerprint": model["fingerprint"],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )


def _key(request: Request) -> str | None:
    return request.scope.get(KEY_NAME)


def _npy(outcomes: list[Outcome], dtype: DType, model: dict[str, Any]) -> Response:
    bad = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, ClipfleetError)}
    missing = np.full(model["dimension"], np.nan, np.float32)
    rows = [missing if i in bad else _vector(outcome) for i, outcome in enumerate(outcomes)]
    # The gate's would be the fingerprint of now, which may have changed while this was computed.
    headers = {FINGERPRINT_HEADER: model["fingerprint"]}
    response = Response(to_npy(np.stack(rows), dtype), media_type=NPY, headers=headers)
    if bad:
        for error in bad.values():
            count_error(error)
        listed = [{"index": i, "code": error.code} for i, error in bad.items()]
        response.headers[ERRORS_HEADER] = orjson.dumps(listed).decode()
    return response


def _vector(outcome: Outcome) -> np.ndarray:
    assert not isinstance(outcome, ClipfleetError)
    return outcome.vector if isinstance(outcome, EncodedText) else outcome


def _entry(number: int, outcome: Outcome, options: schemas.Options) -> dict[str, Any]:
    entry: dict[str, Any] = {"object": "embedding", "index": number}
    if isinstance(outcome, ClipfleetError):
        count_error(outcome)
        error = error_body(outcome)["error"]
        return entry | {"embedding": None, "error": {"code": error["code"], "message": error["message"]}}
    vector = _vector(outcome)
    entry["embedding"] = to_base64(vector, options.dtype) if options.encoding_format == "base64" else vector
    if isinstance(outcome, EncodedText) and outcome.truncated:
        entry["truncated"] = True
    return entry
