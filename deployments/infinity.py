"""infinity's routes: who moves from there changes the URL alone."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import field_validator
from starlette.requests import Request
from starlette.responses import Response

from deployments.answers import ITEMS, KEYED, OPEN, answers
from deployments.requests import Requests
from deployments.responses import json_response
from deployments.schemas import EmbeddingsRequest, EmbeddingsResponse, Wire

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


class InfinityStats(Wire):
    """What the ingress replica that answers has in hand."""

    queue_absolute: int
    """Items."""
    queue_fraction: float
    """Of `limits.inflight_items`."""


class InfinityModel(Wire):
    """The served checkpoint as infinity describes its own."""

    id: str
    object: Literal["model"]
    owned_by: Literal["clipfleet"]
    created: int
    """Seconds since 1970, of the answer."""
    backend: str
    """The engine."""
    dtype: str
    """The precision."""
    embedding_dtype: Literal["float32"]
    revision: str | None
    capabilities: list[str]
    stats: InfinityStats


class InfinityModelList(Wire):
    """What `/models` answers, a list of one."""

    object: Literal["list"]
    data: list[InfinityModel]


class Alive(Wire):
    """What `/health` answers."""

    unix: float
    """Seconds since 1970."""


def add_routes(
    app: FastAPI,
    requests: Requests,
    embed: Callable[[Request, type[EmbeddingsRequest]], Awaitable[Response]],
    *,
    show: bool,
) -> None:
    """Add `/embeddings`, `/models` and `/health`; `show` them in the application's document, too."""

    async def embeddings(request: Request) -> Response:
        """For infinity's clients: as `POST /v1/embeddings`.

        The model `default/not-specified` and 0 dimensions mean the served ones.
        """
        return await embed(request, InfinityRequest)

    async def models() -> Response:
        """For infinity's clients: the served model, as a list of one."""
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
        """For infinity's clients: 200 once the encoders run."""
        requests.check_model()
        return json_response({"unix": time.time()})

    def route(method: str, path: str, handler: Any, good: type[Wire], statuses: tuple[int, ...]) -> None:
        documented = answers(good, statuses)
        app.add_api_route(
            path, handler, methods=[method], response_model=None, responses=documented, include_in_schema=show
        )

    route("POST", "/embeddings", embeddings, EmbeddingsResponse, ITEMS)
    route("GET", "/models", models, InfinityModelList, KEYED)
    route("GET", "/health", health, Alive, OPEN)
