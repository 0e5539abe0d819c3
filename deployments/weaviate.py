"""The routes of Weaviate's module multi2vec-clip: its CLIP_INFERENCE_API may be the address of this service."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field, StrictStr
from starlette.requests import Request
from starlette.responses import Response

from clipfleet.errors import ClipfleetError
from deployments.inputs import read_items
from deployments.requests import Requests
from deployments.responses import error_response, json_response, vector
from deployments.schemas import Wire, public_model

Strings = Annotated[list[StrictStr], Field(fail_fast=True)]


class VectorizeRequest(Wire):
    """`POST /vectorize`; an image is base64. Weaviate sends null for what it has none of."""

    texts: Strings | None = None
    images: Strings | None = None


def add_routes(app: FastAPI, requests: Requests) -> None:
    """Add `/vectorize`, `/meta` and `/.well-known/live` and `ready`. Its documentation describes them."""

    async def vectorize(request: Request) -> Response:
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
                _, outcomes = await requests.embed(asked, read)
        except ClipfleetError as error:
            return _refusal(error, error.message)
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, ClipfleetError):
                place = f"texts[{number}]" if number < count else f"images[{number - count}]"
                return _refusal(outcome, f"{place}: {outcome.message}")
        vectors = [vector(outcome) for outcome in outcomes]
        return json_response({"textVectors": vectors[:count], "imageVectors": vectors[count:]})

    async def meta() -> Response:
        return json_response(public_model(requests.check_model()))

    async def live() -> Response:
        return Response(status_code=204)

    async def ready() -> Response:
        return Response(status_code=204 if requests.health.ready() else 503)

    routes: list[tuple[str, str, Any]] = [
        ("POST", "/vectorize", vectorize),
        ("GET", "/meta", meta),
        ("GET", "/.well-known/live", live),
        ("GET", "/.well-known/ready", ready),
    ]
    for method, path, handler in routes:
        app.add_api_route(path, handler, methods=[method], include_in_schema=False)


def _refusal(error: ClipfleetError, message: str) -> Response:
    """Weaviate reads `error` as a string; in OpenAI's body it would find none, and say only that it cannot read it."""
    answer = error_response(error)
    plain = json_response({"error": message}, answer.status_code)
    plain.headers.update({name: answer.headers[name] for name in ("Retry-After",) if name in answer.headers})
    return plain
