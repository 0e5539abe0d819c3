"""Clients of a running service: any number of items in, vectors out, in their order."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
    Sized,
)
from concurrent.futures import Future
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from clipfleet import wire
from clipfleet.connection import Connection
from clipfleet.errors import ClipfleetError, Closed, EmptyInput, FingerprintMismatch, InputError, SettingsError
from clipfleet.loop_thread import LoopThread
from clipfleet.vectors import Ranked
from clipfleet.wire import Embedding, Part

if TYPE_CHECKING:
    from clipfleet.wire import Image

T = TypeVar("T")
What = Literal["images", "texts"]
OnError = Literal["fail", "partial"]

_TOO_LARGE = ("too_many_items", "body_too_large")


class _Core:
    """What both clients share: requests, in no order."""

    def __init__(self, url: str, api_key: str | None, model: str | None, deadline_s: float) -> None:
        self.connection = Connection(url, api_key, deadline_s)
        self._options = {"model": model} if model is not None else {}

    async def embed(self, part: Part, on_error: OnError) -> list[Embedding]:
        """A part's embeddings, from one request or as many as the service's limits want."""
        sent: list[Any] = []  # files' bytes, texts or addresses
        unsent: dict[int, InputError] = {}  # what cannot be read here
        for index, item in enumerate(part.items, part.first):
            try:
                sent.append(await self._ready(part.kind, item))
            except InputError as error:
                if on_error == "fail":
                    if sent:  # one before it may be bad too, and is then the first
                        await self._send(Part(part.kind, part.first, part.items[: len(sent)]), sent, on_error)
                    raise error.at(index) from None
                sent.append(b"" if part.kind == "files" else "")  # keeps the places of the others
                unsent[index] = error
        found = await self._send(part, sent, on_error)
        return [
            Embedding(each.index, None, unsent[each.index].at(each.index)) if each.index in unsent else each
            for each in found
        ]

    async def _ready(self, kind: wire.Kind, item: Any) -> Any:
        if kind == "files":
            return item if isinstance(item, bytes) else await asyncio.to_thread(wire.content_of, item)
        wire.check_text(item)
        return item

    async def _send(self, part: Part, sent: Sequence[Any], on_error: OnError) -> list[Embedding]:
        try:
            answer = await self.connection.ask(**wire.request(part, sent, on_error, self._options))
        except ClipfleetError as error:
            if error.code in _TOO_LARGE and len(part.items) > 1:
                first, second = part.halves()
                half = len(first.items)
                return [
                    *await self._send(first, sent[:half], on_error),
                    *await self._send(second, sent[half:], on_error),
                ]
            placed = error if error.index is None else error.at(part.first + error.index)
            if on_error == "partial" and error.code in _TOO_LARGE:
                return [Embedding(part.first, None, placed)]
            raise placed from None
        return wire.read_embeddings(answer, part)

    async def rank(self, query: Any, candidates: Sequence[Any]) -> list[Ranked]:
        asked = await asyncio.to_thread(wire.rank_request, query, candidates, self._options)
        return wire.read_ranking(await self.connection.ask(**asked))

    async def models(self) -> list[dict[str, Any]]:
        return wire.read_models(await self.connection.ask("GET", "/v1/models"))


class _OneCheckpoint:
    """Lets embeddings pass while they are of the first one's checkpoint."""

    def __init__(self) -> None:
        self._fingerprint: str | None = None

    def check(self, embedding: Embedding) -> Embedding:
        if embedding.fingerprint is not None:
            first = self._fingerprint = self._fingerprint or embedding.fingerprint
            if embedding.fingerprint != first:
                raise FingerprintMismatch(
                    f"the service changed its checkpoint at item {embedding.index} ({first} to "
                    f"{embedding.fingerprint}); embed all of it again",
                    fingerprints=[first, embedding.fingerprint],
                )
        return embedding


class _Client:
    """A service's client. It keeps its connections until it is closed.

    `deadline_s` is for one request with all its repetitions, of which `concurrency` are under way at once. With `model` the
    service refuses to answer with another one. Raises SettingsError for a `url` that is none.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        model: str | None = None,
        deadline_s: float = 120.0,
        concurrency: int = 4,
    ) -> None:
        if concurrency < 1:
            raise SettingsError(f"concurrency is a number of requests from 1 on, not {concurrency}")
        self._concurrency = concurrency
        self._core = _Core(url, api_key, model, deadline_s)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._core.connection.url!r})"


class AsyncClient(_Client):
    """A service's client for asyncio: the calls of `Client`, to await."""

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._core.connection.close()

    async def embed_images(
        self, images: Iterable[Image] | AsyncIterable[Image], *, on_error: OnError = "fail", progress: bool = False
    ) -> np.ndarray:
        """As `Client.embed_images`."""
        return await self._embed(images, "images", on_error, progress)

    async def embed_texts(
        self, texts: Iterable[str] | AsyncIterable[str], *, on_error: OnError = "fail", progress: bool = False
    ) -> np.ndarray:
        """As `Client.embed_texts`."""
        return await self._embed(texts, "texts", on_error, progress)

    def stream_images(self, images: Iterable[Image] | AsyncIterable[Image]) -> AsyncGenerator[Embedding, None]:
        """As `Client.stream_images`; `images` may be an async iterable."""
        return self._stream(images, "images", "partial")

    def stream_texts(self, texts: Iterable[str] | AsyncIterable[str]) -> AsyncGenerator[Embedding, None]:
        """As `Client.stream_texts`; `texts` may be an async iterable."""
        return self._stream(texts, "texts", "partial")

    async def rank(self, query: Image | str, candidates: Sequence[Image | str]) -> list[Ranked]:
        """As `Client.rank`."""
        return await self._core.rank(query, candidates)

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        return await self._core.models()

    async def _embed(self, items: Any, what: What, on_error: OnError, progress: bool) -> np.ndarray:
        found = []
        with _bar(items, what, progress) as bar:
            async with aclosing(self._stream(items, what, on_error)) as stream:
                async for embedding in stream:
                    found.append(embedding)
                    bar.update()
        return _matrix(found, what) if _known(found) else _matrix(found, what, await self.models())

    async def _stream(self, items: Any, what: What, on_error: OnError) -> AsyncGenerator[Embedding, None]:
        checkpoint = _OneCheckpoint()
        waiting: deque[asyncio.Task[list[Embedding]]] = deque()
        try:
            async for part in _async_parts(items, what):
                waiting.append(asyncio.create_task(self._core.embed(part, on_error)))
                if len(waiting) == self._concurrency:
                    for embedding in await waiting.popleft():
                        yield checkpoint.check(embedding)
            while waiting:
                for embedding in await waiting.popleft():
                    yield checkpoint.check(embedding)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


class Client(_Client):
    """A service's client, which threads may share. It keeps its connections until it is closed.

    `deadline_s` is for one request with all its repetitions, of which `concurrency` are under way at once. With `model` the
    service refuses to answer with another one. Raises SettingsError for a `url` that is none.
    """

    _loop: LoopThread | None = None
    _closed = False

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; what other threads wait for is cancelled."""
        with self._lock:
            loop, self._loop, self._closed = self._loop, None, True
        if loop is not None:
            loop.end(self._core.connection.close())

    def embed_images(
        self, images: Iterable[Image], *, on_error: OnError = "fail", progress: bool = False
    ) -> np.ndarray:
        """Unit vectors (n, d), float32, of images: paths, files' bytes, addresses (`http:`, `https:`, where the service fetches
        them, or `data:`), arrays uint8 (H, W), (H, W, 3) or (H, W, 4), or PIL images.

        The first bad image raises its ImageError, with its `index`; with on_error="partial" its row is NaN instead, and
        `stream_images` tells why. Other InputErrors are raised as the service words them, a ServiceError when it could not
        answer before the deadline, and FingerprintMismatch when it changed its checkpoint in the middle.
        """
        return self._embed(images, "images", on_error, progress)

    def embed_texts(self, texts: Iterable[str], *, on_error: OnError = "fail", progress: bool = False) -> np.ndarray:
        """Unit vectors (n, d), float32; a text over the checkpoint's context is cut. Raises as `embed_images` does."""
        return self._embed(texts, "texts", on_error, progress)

    def stream_images(self, images: Iterable[Image]) -> Generator[Embedding, None, None]:
        """The embedding of each image, in order, with an error for each bad one. `images` is drawn from as answers come, a few
        requests ahead, so that it may be endless. Raises as `embed_images` does for all that concerns no single image."""
        return self._stream(images, "images", "partial")

    def stream_texts(self, texts: Iterable[str]) -> Generator[Embedding, None, None]:
        """The embedding of each text, as `stream_images`."""
        return self._stream(texts, "texts", "partial")

    def rank(self, query: Image | str, candidates: Sequence[Image | str]) -> list[Ranked]:
        """The candidates by their cosine to the query, best first. A str is a text or an address; give paths as Path."""
        return _result(self._submit(self._core.rank(query, candidates)))

    def models(self) -> list[dict[str, Any]]:
        """What the service serves: id, dimension, context_length, image_size, fingerprint and more of each model."""
        return _result(self._submit(self._core.models()))

    def _embed(self, items: Any, what: What, on_error: OnError, progress: bool) -> np.ndarray:
        found = []
        with _bar(items, what, progress) as bar, closing(self._stream(items, what, on_error)) as stream:
            for embedding in stream:
                found.append(embedding)
                bar.update()
        return _matrix(found, what) if _known(found) else _matrix(found, what, self.models())

    def _stream(self, items: Any, what: What, on_error: OnError) -> Generator[Embedding, None, None]:
        checkpoint = _OneCheckpoint()
        waiting: deque[Future[list[Embedding]]] = deque()
        try:
            for part in _parts(items, what):  # in the caller's thread, which may own what it draws from
                waiting.append(self._submit(self._core.embed(part, on_error)))
                if len(waiting) == self._concurrency:
                    for embedding in _result(waiting.popleft()):
                        yield checkpoint.check(embedding)
            while waiting:
                for embedding in _result(waiting.popleft()):
                    yield checkpoint.check(embedding)
        finally:
            for future in waiting:
                future.cancel()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._closed or (self._loop is not None and self._loop.pid != os.getpid()):
                work.close()
                why = "is closed" if self._closed else "was used before a fork; make one in each process"
                raise Closed(f"{self!r} {why}")
            if self._loop is None:
                self._loop = LoopThread()
                weakref.finalize(self, _close, self._loop, self._core.connection)
            return self._loop.submit(work)


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except BaseException:
        future.cancel()  # after Ctrl-C it would go on
        raise


def _close(loop: LoopThread, connection: Connection) -> None:
    loop.end(connection.close())


def _check_list(items: Any, what: What) -> None:
    if isinstance(items, (str, bytes, os.PathLike)) or not isinstance(items, (Iterable, AsyncIterable)):
        raise TypeError(f"a list of {what} is needed, not one {type(items).__name__}")


def _parts(items: Any, what: What) -> Iterator[Part]:
    _check_list(items, what)
    packer = wire.Packer(what)
    for item in items:
        if part := packer.add(item):
            yield part
    if part := packer.rest():
        yield part


async def _async_parts(items: Any, what: What) -> AsyncIterator[Part]:
    if not isinstance(items, AsyncIterable):
        for part in _parts(items, what):
            yield part
        return
    packer = wire.Packer(what)
    async for item in items:
        if part := packer.add(item):
            yield part
    if part := packer.rest():
        yield part


def _bar(items: Any, what: What, shown: bool) -> tqdm[Any]:
    return tqdm(
        total=len(items) if isinstance(items, Sized) else None, desc="Embedding", unit=what[:-1], disable=not shown
    )


def _known(found: Sequence[Embedding]) -> bool:
    return not found or any(each.vector is not None for each in found)


def _matrix(found: Sequence[Embedding], what: What, models: Sequence[dict[str, Any]] = ()) -> np.ndarray:
    """The vectors (n, d), with NaN for errors; d is the model's where there is no vector."""
    if not found:
        raise EmptyInput(f"the list of {what} is empty; send at least one")
    vectors = (each.vector for each in found if each.vector is not None)
    missing = np.full_like(next(vectors), np.nan) if not models else np.full(models[0]["dimension"], np.nan, np.float32)
    return np.stack([missing if each.vector is None else each.vector for each in found])
