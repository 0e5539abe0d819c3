"""infinity's routes: who moves from there changes the URL alone."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from pydantic import field_validator
from starlette.requests import Request
from starlette.responses import Response

from deployments.requests import Requests
from deployments.responses import json_response
from deployments.schemas import EmbeddingsRequest

ANY_MODEL = "default/not-specified"  # what its clients send who name none


class InfinityRequest(EmbeddingsRequest):
    """`POST /embeddings`: ours but for two ways to say "the default"."""

    @field_validator("model", mode="before")
    @classmethod
    def _any_model(cls, value: object) -> object:
        return None if value == ANY_MODEL else value

    @field_validator("dimensions", mode="before")
    @classmethod
    def _all_dimensions(cls, value: object) -> object:
        return None if value == 0 and value is not False else value


def add_routes(
    app: FastAPI, requests: Requests, embed: Callable[[Request, type[EmbeddingsRequest]], Awaitable[Response]]
) -> None:
    """Add `/embeddings`, `/models` and `/health`. Its documentation describes them, /openapi.json does not."""

    async def embeddings(request: Request) -> Response:
        return await embed(request, InfinityRequest)

    async def models() -> Response:
        model, held = requests.check_model(), requests.admission.items()
        described: dict[str, Any] = {
            "id": model["id"],
            "object": "model",
            "owned_by": "clipfleet",
            "created": int(time.time()),
            "backend": model["engine"],
            "dtype": model["precision"],
            "embedding_dtype": "float32",
            "revision": model["revision"],
            "capabilities": ["embed", "image_embed"],
            "stats": {"queue_absolute": held, "queue_fraction": held / requests.limits.inflight_items},
        }
        return json_response({"object": "list", "data": [described]})

    async def health() -> Response:
        requests.check_model()
        return json_response({"unix": time.time()})

    app.add_api_route("/embeddings", embeddings, methods=["POST"], include_in_schema=False)
    app.add_api_route("/models", models, methods=["GET"], include_in_schema=False)
    app.add_api_route("/health", health, methods=["GET"], include_in_schema=False)
