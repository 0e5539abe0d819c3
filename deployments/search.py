"""Search in a Qdrant collection: by text, by image, by a row that is in it, or by several of them with weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from loguru import logger
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from clipfleet.errors import (
    ClipfleetError,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    Overloaded,
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
_WAITING = 64  # of each that is at work: others get 429, since they would only wait
_TIMEOUT_S = 5  # of a server
_FILTER_LEVELS = 12
_LEAST = 1e-6  # the length of a sum of unit vectors that cancel out


class Searcher:
    """The collection as one ingress replica sees it, opened at the first search: a Qdrant that is away stops no start."""

    def __init__(self, settings: SearchSettings) -> None:
        from qdrant_client import models  # now: it takes a second or two

        self._filter = models.Filter
        self._collection = Collection(settings.qdrant, settings.collection, settings.qdrant_api_key)
        self.templates = settings.templates
        threads = 1 if self._collection.is_folder else _THREADS
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="search")
        self._asked, self._most_asked = 0, _WAITING * threads
        # Values and letters of a filter. In local mode Python compares each of them with each point.
        self._most = (64, 1000) if self._collection.is_folder else (1024, 20_000)
        self._points: Points | None = None
        self._fits: str | None = None  # the fingerprint that the collection had
        self._looked = 0.0  # time.monotonic() of the last look at that
        self._looking: asyncio.Task[Points] | None = None
        self._looks_for = ""  # the fingerprint that it asks about
        self._closed = False

    async def ask(self, question: Callable[[Points], T], fingerprint: str, dimension: int, seconds: float) -> T:
        """What the collection answers. Raises Overloaded, Unavailable or DeadlineExceeded."""
        if self._asked >= self._most_asked:
            raise Overloaded(f"{self._asked:,} searches wait; the limit is {self._most_asked:,}", retry_after=1)
        self._asked += 1
        try:
            async with asyncio.timeout(seconds):
                points = await self._opened(fingerprint, dimension)
                return await self._run(lambda: question(points))
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before Qdrant had answered") from None
        except FingerprintMismatch as error:
            raise Unavailable(
                f"the collection holds vectors of another checkpoint (fingerprint {error.data['found']}) than the served one "
                f"({fingerprint})",
                retry_after=30,
            ) from error
        except (
            SetupError,
            Unavailable,
        ) as error:  # where Qdrant is, and how it failed, is for whoever runs the service
            logger.error("search failed: {}", error.message)
            raise Unavailable(
                "the collection cannot be searched now; the service's log says why", retry_after=2
            ) from error
        finally:
            self._asked -= 1

    def filter(self, content: dict[str, Any] | None) -> models.Filter | None:
        """Qdrant's filter of its JSON. Raises InvalidRequest."""
        if content is None:
            return None
        _check_size(content, *self._most)
        try:
            return self._filter.model_validate(content)
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors(include_input=False, include_url=False)[0]["loc"])
            raise InvalidRequest(f"filter is none of Qdrant's: {place[:100]}", param="filter") from None

    def close(self) -> None:
        """Let go of a folder, for good: another process wants it."""
        self._closed = self._collection.is_folder
        if self._points is not None and self._closed:
            self._pool.submit(self._points.close)
            self._points = self._fits = None

    async def _opened(self, fingerprint: str, dimension: int) -> Points:
        """The open collection, which is looked at again from time to time. One look is for all who wait for it, and goes on
        when they have gone."""
        if self._closed:
            raise Unavailable("this replica has been replaced and searches no more; ask again", retry_after=1)
        due = self._points is None or self._fits != fingerprint or time.monotonic() - self._looked > _CHECKED_S
        if due and (self._looking is None or self._looking.done()):
            self._looks_for = fingerprint
            self._looking = asyncio.create_task(self._look(fingerprint, dimension))
            self._looking.add_done_callback(
                lambda task: task.cancelled() or task.exception()
            )  # nobody may be left to ask
        if self._points is not None and self._fits == fingerprint:
            return self._points  # meanwhile
        assert self._looking is not None
        if self._looks_for != fingerprint:  # another checkpoint's, whose outcome is not ours
            await asyncio.wait([self._looking])
            return await self._opened(fingerprint, dimension)
        return await asyncio.shield(self._looking)

    async def _look(self, fingerprint: str, dimension: int) -> Points:
        try:
            points = self._points or await self._run(
                lambda: Points(self._collection, patience_s=_PATIENCE_S, tries=1, timeout_s=_TIMEOUT_S)
            )
            if self._closed:  # while it was opened
                self._pool.submit(points.close)
                raise Unavailable("the collection was closed meanwhile", retry_after=1)
            self._points = points
            await self._run(lambda: points.check(fingerprint, dimension))
        except BaseException:
            self._fits = None
            raise
        if self._points is not points:
            raise Unavailable("the collection was closed meanwhile", retry_after=1)
        self._fits, self._looked = fingerprint, time.monotonic()
        return points

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
            requests.check_model(wanted.model)
            where = searcher.filter(wanted.filter)
            places, weights, rows = _weighed(wanted.query)
            inputs = self._inputs(_parts(wanted.query), searcher.templates)
            limit, offset, thumbnails = wanted.limit, wanted.offset, wanted.thumbnails
            del wanted  # the images once more, as base64
            model, found = await requests.embed(asked, [item for part in inputs for item in part])
            outcomes = iter(found)
            embedded = [[next(outcomes) for _ in part] for part in inputs]
            for place, part in zip(places, embedded, strict=True):
                for outcome in part:
                    if isinstance(outcome, ClipfleetError):
                        return error_response(outcome, place)

            async def ask(question: Callable[[Points], T]) -> T:
                with requests.admission.hold_key(asked.key, 1):
                    return await searcher.ask(question, model["fingerprint"], model["dimension"], asked.seconds_left)

            query = np.zeros(model["dimension"], np.float32)
            for place, weight, row, part in zip(places, weights, rows, embedded, strict=True):
                if row is None:
                    own = np.mean([vector(outcome) for outcome in part], axis=0)
                else:
                    own = await ask(lambda points, row=row: points.vector_of(row))
                if own is None:
                    raise InvalidRequest(f"there is no row {str(row)[:200]!r} in the collection", param=place)
                query += weight * _unit(own)
            if np.linalg.norm(query) < _LEAST:
                raise InvalidRequest(
                    "the items and their weights cancel out: nothing is left to search for", param="query"
                )
            unit = _unit(query)
            hits = await ask(
                lambda points: points.search(unit, limit=limit, offset=offset, where=where, thumbnails=thumbnails)
            )
        results = [
            {"id": str(hit.payload.get("id", hit.point)), "score": hit.score, "payload": hit.payload} for hit in hits
        ]
        return json_response(
            {"object": "list", "model": model["id"], "fingerprint": model["fingerprint"], "results": results},
            fingerprint=model["fingerprint"],
        )

    def _inputs(self, parts: Sequence[WeightedItem], templates: Sequence[str]) -> list[list[Input | ImageUrl]]:
        """What has to be embedded for each part: its image, or its text in each template; nothing for a row."""
        limits, urls = self._requests.limits, self._requests.urls
        items: list[list[ImageItem | TextItem]] = [
            [ImageItem(image=part.image)] if part.image is not None else [] for part in parts
        ]
        for own, part in zip(items, parts, strict=True):
            if part.image is None and part.text is not None:
                # One without a template where it gets an error: templates would multiply what is too long.
                fits = 0 < len(part.text) <= limits.text_characters
                texts = [template.replace("{}", part.text) for template in templates] if fits else [part.text]
                own += [TextItem(text=text) for text in texts]
        flat = [item for part in items for item in part]
        read = iter(read_items(flat, "text", limits, "query", urls=urls) if flat else [])
        return [[next(read) for _ in part] for part in items]


def _weighed(query: str | WeightedItem | list[WeightedItem]) -> tuple[list[str], list[float], list[str | None]]:
    """Of each part: its name in errors, its weight, and the row that it names, if it does."""
    parts = _parts(query)
    places = [f"query[{number}]" if isinstance(query, list) else "query" for number in range(len(parts))]
    return places, [part.weight for part in parts], [part.id for part in parts]


def _parts(query: str | WeightedItem | list[WeightedItem]) -> list[WeightedItem]:
    if isinstance(query, str):
        return [WeightedItem(text=query)]
    return query if isinstance(query, list) else [query]


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), _LEAST)


def _check_size(content: Any, most_values: int, most_letters: int) -> None:
    """Refuse a filter whose check, which is one for every level and every kind of condition, or whose use would take long."""
    values = letters = 0
    level: list[Any] = [content]
    for _ in range(_FILTER_LEVELS):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                letters += sum(map(len, one))
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str):
                letters += len(one)
        values += len(inner)
        if values > most_values or letters > most_letters:
            break
        if not inner:
            return
        level = inner
    raise InvalidRequest(
        f"the filter is too large: it may have {most_values:,} values and {most_letters:,} characters, and be "
        f"{_FILTER_LEVELS} levels deep",
        param="filter",
    )
