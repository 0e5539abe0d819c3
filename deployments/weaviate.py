"""The routes of Weaviate's module multi2vec-clip: its CLIP_INFERENCE_API may be the address of this service."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field, StrictStr
from starlette.requests import Request
from starlette.responses import Response

from clipfleet.errors import ClipfleetError
from deployments.answers import KEYED, answers
from deployments.inputs import read_items
from deployments.requests import Requests
from deployments.responses import error_response, json_response, vector
from deployments.schemas import Model, Wire, public_model

Strings = Annotated[list[StrictStr], Field(fail_fast=True)]


class VectorizeRequest(Wire):
    """`POST /vectorize`. Weaviate sends null for what it has none of."""

    texts: Strings | None = None
    images: Strings | None = None
    """Each as base64."""


class Vectors(Wire):
    """What `/vectorize` answers: a vector for each item, in order."""

    textVectors: list[list[float]]
    imageVectors: list[list[float]]


class Refusal(Wire):
    """An error as Weaviate reads it. Where no API key was sent, or no replica runs, it has OpenAI's body all the same."""

    error: str


def add_routes(app: FastAPI, requests: Requests, *, show: bool) -> None:
    """Add `/vectorize`, `/meta` and `/.well-known/live` and `ready`; `show` them in the application's document, too."""

    async def vectorize(request: Request) -> Response:
        """For Weaviate: embed texts and images. The first bad one decides the answer."""
        try:
            with requests.asked(request) as asked:
                wanted = await requests.read_json(asked, VectorizeRequest)
                texts, images = wanted.texts or [], wanted.images or []
                requests.check_model()  # while there is none, nothing of the images is decoded
                read = [
                    *(read_items(texts, "text", requests.limits, "texts", urls=requests.urls) if texts else []),
                    *(read_items(images, "image", requests.limits, "images", urls=requests.urls) if images else []),
                ]
                count = len(texts)
                del wanted, texts, images
                model, outcomes = await requests.embed(asked, read)
        except ClipfleetError as error:
            return _refusal(error, error.message)
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, ClipfleetError):
                place = f"texts[{number}]" if number < count else f"images[{number - count}]"
                return _refusal(outcome, f"{place}: {outcome.message}")
        vectors = [vector(outcome) for outcome in outcomes]
        content = {"textVectors": vectors[:count], "imageVectors": vectors[count:]}
        return json_response(content, fingerprint=model["fingerprint"])

    async def meta() -> Response:
        """For Weaviate: the served model."""
        return json_response(public_model(requests.check_model()))

    async def live() -> Response:
        """For Weaviate: 204 while the ingress is alive."""
        return Response(status_code=204)

    async def ready() -> Response:
        """For Weaviate: 204 while every deployment has worked within the last 10 s."""
        return Response(status_code=204 if requests.health.ready() else 503)

    def route(
        method: str, path: str, handler: Any, documented: dict[int | str, dict[str, Any]], good: int = 200
    ) -> None:
        app.add_api_route(
            path, handler, methods=[method], response_model=None, status_code=good, responses=documented,
            include_in_schema=show,
        )  # fmt: skip

    unready: dict[int | str, dict[str, Any]] = {503: {"description": "A deployment has not, or no replica can answer."}}
    route("POST", "/vectorize", vectorize, answers(Vectors, (*KEYED, 413, 415, 422), Refusal))
    route("GET", "/meta", meta, answers(Model, KEYED))
    route("GET", "/.well-known/live", live, {}, 204)
    route("GET", "/.well-known/ready", ready, unready, 204)


def _refusal(error: ClipfleetError, message: str) -> Response:
    """Weaviate reads `error` as a string; in OpenAI's body it would find none, and say only that it cannot read it."""
    answer = error_response(error)
    plain = json_response({"error": message}, answer.status_code)
    plain.headers.update({name: answer.headers[name] for name in ("Retry-After",) if name in answer.headers})
    return plain
