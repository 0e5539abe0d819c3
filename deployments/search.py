"""Search in a Qdrant collection: by text, by image, by a row that is in it, or by several of them with weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from clipfleet.errors import (
    ClipfleetError,
    DeadlineExceeded,
    InvalidRequest,
    RouteNotFound,
    SetupError,
    Unavailable,
)
from clipfleet.qdrant import Collection, Points
from clipfleet.settings import SearchSettings
from deployments.inputs import ImageUrl, Input, read_items
from deployments.requests import Requests
from deployments.responses import error_response, json_response, vector
from deployments.schemas import ImageItem, SearchRequest, TextItem, WeightedItem

if TYPE_CHECKING:
    from qdrant_client import models

T = TypeVar("T")

_CHECKED_S = 10.0  # how long a collection's fingerprint is taken to be what it was
_PATIENCE_S = 5.0  # another process may still have the folder: the service before an upgrade, or a job
_THREADS = 8  # searches of a server at once; a folder's take turns
_LEAST = 1e-6  # the length of a sum of unit vectors that cancel out


class Searcher:
    """The collection as one ingress replica sees it, opened at the first search: a Qdrant that is away stops no start."""

    def __init__(self, settings: SearchSettings) -> None:
        self._collection = Collection(settings.qdrant, settings.collection, settings.qdrant_api_key)
        self.templates = settings.templates
        threads = 1 if self._collection.is_folder else _THREADS
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="search")
        self._opening = asyncio.Lock()
        self._points: Points | None = None
        self._checked: tuple[str, float] = ("", 0.0)  # the fingerprint that fitted, and time.monotonic() of that

    async def ask(self, question: Callable[[Points], T], fingerprint: str, dimension: int, seconds: float) -> T:
        """What the collection answers. Raises Unavailable, DeadlineExceeded, or FingerprintMismatch if it has other vectors."""
        try:
            async with asyncio.timeout(seconds):
                points = await self._opened(fingerprint, dimension)
                return await self._run(lambda: question(points))
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before Qdrant had answered") from None
        except SetupError as error:  # a collection that does not fit: whoever runs the service can mend it
            raise Unavailable(error.message, retry_after=30) from error

    async def _opened(self, fingerprint: str, dimension: int) -> Points:
        async with self._opening:
            if self._points is None:
                self._points = await self._run(lambda: Points(self._collection, patience_s=_PATIENCE_S, tries=1))
            found, at = self._checked
            if found != fingerprint or time.monotonic() - at > _CHECKED_S:
                points = self._points
                await self._run(lambda: points.check(fingerprint, dimension))
                self._checked = (fingerprint, time.monotonic())
        return self._points

    async def _run(self, what: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, what)


class SearchRoute:
    """`POST /v1/search`."""

    def __init__(self, requests: Requests, searcher: Searcher | None) -> None:
        self._requests = requests
        self._searcher = searcher

    @property
    def is_on(self) -> bool:
        """Whether there is a collection to search."""
        return self._searcher is not None

    async def search(self, request: Request) -> Response:
        """Search the collection for texts, images, or rows that are in it."""
        requests, searcher = self._requests, self._searcher
        if searcher is None:
            raise RouteNotFound("this service searches no collection; set args.search, or start it with --index")
        with requests.asked(request) as asked:
            wanted = await requests.read_json(asked, SearchRequest)
            model = requests.check_model(wanted.model)
            where = _filter(wanted.filter)
            parts = _parts(wanted.query)
            inputs = self._inputs(parts, searcher.templates)
            outcomes = iter(await requests.embed(asked, [item for row in inputs for item in row], model))
            grouped = [[next(outcomes) for _ in row] for row in inputs]
            for number, row in enumerate(grouped):
                for outcome in row:
                    if isinstance(outcome, ClipfleetError):
                        return error_response(outcome, _place(wanted.query, number))
            limit, offset, thumbnails = wanted.limit, wanted.offset, wanted.thumbnails

            async def ask(question: Callable[[Points], T]) -> T:
                return await searcher.ask(question, model["fingerprint"], model["dimension"], asked.seconds_left)

            query = np.zeros(model["dimension"], np.float32)
            for number, (part, row) in enumerate(zip(parts, grouped, strict=True)):
                name = part.id or ""  # one of the three is there
                found = (
                    _mean([vector(outcome) for outcome in row]) if row else await ask(lambda p, n=name: p.vector_of(n))
                )
                if found is None:
                    raise InvalidRequest("there is no such row in the collection", param=_place(wanted.query, number))
                query += part.weight * _unit(found)
            if np.linalg.norm(query) < _LEAST:
                raise InvalidRequest(
                    "the items and their weights cancel out: nothing is left to search for", param="query"
                )
            query = _unit(query)
            found = await ask(
                lambda points: points.search(query, limit=limit, offset=offset, where=where, thumbnails=thumbnails)
            )
        results = [
            {"id": each.payload.get("id", each.point), "score": each.score, "payload": each.payload} for each in found
        ]
        return json_response(
            {"object": "list", "model": model["id"], "fingerprint": model["fingerprint"], "results": results}
        )

    def _inputs(self, parts: Sequence[WeightedItem], templates: Sequence[str]) -> list[list[Input | ImageUrl]]:
        """What has to be embedded for each part: its image, or its text in each template; nothing for a row."""
        limits, urls = self._requests.limits, self._requests.urls
        inputs: list[list[Input | ImageUrl]] = []
        for part in parts:
            if part.image is not None:
                inputs.append(read_items([ImageItem(image=part.image)], "text", limits, "query", urls=urls))
            elif part.text:
                texts = [TextItem(text=template.replace("{}", part.text)) for template in templates]
                inputs.append(read_items(texts, "text", limits, "query", urls=urls))
            elif part.text is not None:
                raise InvalidRequest("query: the text is empty", param="query")
            else:
                inputs.append([])
        return inputs


def _parts(query: str | WeightedItem | list[WeightedItem]) -> list[WeightedItem]:
    if isinstance(query, str):
        return [WeightedItem(text=query)]
    return query if isinstance(query, list) else [query]


def _place(query: object, number: int) -> str:
    return f"query[{number}]" if isinstance(query, list) else "query"


def _mean(vectors: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean(vectors, axis=0)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), _LEAST)


def _filter(content: dict[str, Any] | None) -> models.Filter | None:
    """Qdrant's filter of its JSON. Raises InvalidRequest."""
    if content is None:
        return None
    from qdrant_client import models

    try:
        return models.Filter.model_validate(content)
    except (ValidationError, RecursionError) as error:
        problems = error.errors(include_input=False, include_url=False) if isinstance(error, ValidationError) else []
        place = ".".join(str(part) for part in problems[0]["loc"]) if problems else "nested too deeply"
        raise InvalidRequest(f"filter is none of Qdrant's: {place[:100]}", param="filter") from None
