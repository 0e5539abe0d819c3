"""A client of a running service: lists of any length in, one array of vectors out."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import numpy as np

from clipfleet.connection import Connection
from clipfleet.errors import ClipfleetError, EmptyInput, FingerprintMismatch, Unavailable
from clipfleet.vectors import from_base64

T = TypeVar("T")
Image = bytes | str | Path

# The service's default limits; one whose own are lower says so, and the part is halved.
_IMAGES, _TEXTS = 64, 2048
_BYTES = 32 * 2**20  # half of the limit of a body, for what JSON and multipart add
_TOO_LARGE = ("too_many_items", "body_too_large")


@dataclass(frozen=True)
class _Vectors:
    """One request's vectors (n, d), and what they may be compared with."""

    rows: np.ndarray
    fingerprint: str


class Client:
    """A service's client. Threads may share it; it keeps its connections until `close`.

    `deadline_s` is for one request with all its repetitions; a long list takes several requests, one after the other.
    With `model` the service refuses to answer with another one.
    """

    def __init__(
        self, url: str, api_key: str | None = None, *, model: str | None = None, deadline_s: float = 120.0
    ) -> None:
        self._connection = Connection(url, api_key, deadline_s)
        self._options = {"model": model} if model is not None else {}

    def __repr__(self) -> str:
        return f"Client({self._connection.url!r})"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def embed_images(self, images: Iterable[Image]) -> np.ndarray:
        """Unit vectors (n, d), float32, of image files' content or paths.

        The first bad image raises its ImageError, with its `index`. Other InputErrors are raised as the service words them,
        a ServiceError when it could not answer before the deadline, FingerprintMismatch when it changed its checkpoint in
        the middle of the list, and OSError for a path.
        """
        return self._embed(images, "images", _IMAGES, _size, self._send_images)

    def embed_texts(self, texts: Iterable[str]) -> np.ndarray:
        """Unit vectors (n, d), float32; a text over the checkpoint's context is cut. Raises as `embed_images` does."""
        return self._embed(texts, "texts", _TEXTS, len, self._send_texts)

    def _embed(
        self,
        items: Iterable[T],
        what: str,
        most: int,
        size: Callable[[T], int],
        send: Callable[[Sequence[T]], _Vectors],
    ) -> np.ndarray:
        if isinstance(items, (str, bytes, Path)):  # of which the first two are iterable too
            raise TypeError(f"embed_{what} takes a list of {what}, not {type(items).__name__}")
        found = [vectors for first, part in _parts(list(items), most, size) for vectors in _send(part, first, send)]
        if not found:
            raise EmptyInput(f"the list of {what} is empty; send at least one")
        fingerprints = {vectors.fingerprint for vectors in found}
        if len(fingerprints) > 1:
            raise FingerprintMismatch(
                f"the service changed its checkpoint in the middle of the list ({' and '.join(sorted(fingerprints))}); "
                "embed it again",
                fingerprints=sorted(fingerprints),
            )
        return np.concatenate([vectors.rows for vectors in found])

    def _send_images(self, images: Sequence[Image]) -> _Vectors:
        content = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in images]
        files = [("files", (f"{number}", image, "application/octet-stream")) for number, image in enumerate(content)]
        accept = {"Accept": "application/x-npy"}
        answer = self._connection.post("/v1/embeddings/images", files=files, params=self._options, headers=accept)
        return _read(answer, len(images), _from_npy)

    def _send_texts(self, texts: Sequence[str]) -> _Vectors:
        content = json.dumps({"input": texts, "encoding_format": "base64", **self._options}).encode()
        kind = {"Content-Type": "application/json"}
        answer = self._connection.post("/v1/embeddings", content=content, headers=kind)
        return _read(answer, len(texts), _from_json)


def _size(image: Image) -> int:
    return len(image) if isinstance(image, bytes) else Path(image).stat().st_size


def _parts(items: Sequence[T], most: int, size: Callable[[T], int]) -> Iterator[tuple[int, Sequence[T]]]:
    """Slices of at most `most` items, and of at most _BYTES where they hold several; each with its first one's place."""
    first = held = 0
    for place, item in enumerate(items):
        added = size(item)
        if place > first and (place - first == most or held + added > _BYTES):
            yield first, items[first:place]
            first, held = place, 0
        held += added
    if items:
        yield first, items[first:]


def _send(part: Sequence[T], first: int, send: Callable[[Sequence[T]], _Vectors]) -> list[_Vectors]:
    """One request, or as many as the service's limits want; `first` is the part's place in the caller's list."""
    try:
        return [send(part)]
    except ClipfleetError as error:
        if error.code in _TOO_LARGE and len(part) > 1:
            half = len(part) // 2
            return _send(part[:half], first, send) + _send(part[half:], first + half, send)
        raise (error if error.index is None else error.at(first + error.index)) from None


def _from_npy(answer: httpx.Response) -> _Vectors:
    rows = np.load(io.BytesIO(answer.content), allow_pickle=False)
    return _Vectors(rows, answer.headers["X-Clipfleet-Fingerprint"])


def _from_json(answer: httpx.Response) -> _Vectors:
    body = answer.json()
    return _Vectors(np.stack([from_base64(row["embedding"]) for row in body["data"]]), body["fingerprint"])


def _read(answer: httpx.Response, count: int, parse: Callable[[httpx.Response], _Vectors]) -> _Vectors:
    try:
        vectors = parse(answer)
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise Unavailable(f"{answer.url} gave an answer that is none of clipfleet's: {error!r}") from error
    if vectors.rows.ndim != 2 or len(vectors.rows) != count:
        raise Unavailable(f"{answer.url} gave vectors of shape {vectors.rows.shape} for {count} items")
    return vectors
