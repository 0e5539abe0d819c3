"""What a client sends to a service and gets back: items become requests, answers become vectors."""

from __future__ import annotations

import base64
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import httpx
import numpy as np

from clipfleet import errors
from clipfleet.errors import (
    ClipfleetError,
    ImageCorrupt,
    ImageNotFound,
    ImageUnreadable,
    InvalidRequest,
    Unavailable,
)
from clipfleet.vectors import Ranked, from_base64

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

    # A file's path or bytes, an address (http:, https: or data:), pixels uint8 (H, W), (H, W, 3) or (H, W, 4), a PIL image.
    Image: TypeAlias = str | os.PathLike[str] | bytes | np.ndarray | PilImage

Kind = Literal["texts", "files", "addresses"]

# The service's default limits; one whose own are lower says so, and the part is halved.
_MOST: dict[Kind, int] = {"texts": 2048, "files": 64, "addresses": 64}
_BYTES = 32 * 2**20  # half of the limit of a body, for what JSON and multipart add
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
_ADDRESSES = ("http://", "https://", "data:")


@dataclass(frozen=True)
class Embedding:
    """What became of one item of a stream: its vector (d,) of unit length, float32, or else its error."""

    index: int
    vector: np.ndarray | None
    error: ClipfleetError | None = None
    truncated: bool = False  # the text was longer than the checkpoint's context
    fingerprint: str | None = None  # of the checkpoint that made it


@dataclass(frozen=True)
class Part:
    """Items of one request; `first` is the first one's place in the caller's input."""

    kind: Kind
    first: int
    items: Sequence[Any]

    def halves(self) -> tuple[Part, Part]:
        half = len(self.items) // 2
        return (
            Part(self.kind, self.first, self.items[:half]),
            Part(self.kind, self.first + half, self.items[half:]),
        )


class Packer:
    """Gathers items into parts that one request may hold, each of items of one kind."""

    def __init__(self, what: Literal["images", "texts"]) -> None:
        self._what = what
        self._kind: Kind = "texts"
        self._items: list[Any] = []
        self._first = self._bytes = 0

    def add(self, item: Any) -> Part | None:
        """Take an item, and give the part that has no room for it. Raises TypeError for what is no item."""
        kind, size = ("texts", _text_size(item)) if self._what == "texts" else _image_kind(item)
        if isinstance(item, (bytearray, memoryview)):  # what its owner may change before it is sent
            item = bytes(item)
        elif hasattr(item, "copy") and not isinstance(item, bytes):
            item = _copied(item)
        full = kind != self._kind or len(self._items) == _MOST[kind] or self._bytes + size > _BYTES
        part = self.rest() if full else None
        self._kind = kind
        self._items.append(item)
        self._bytes += size
        return part

    def rest(self) -> Part | None:
        """The part that is not full."""
        if not self._items:
            return None
        part = Part(self._kind, self._first, self._items)
        self._first += len(self._items)
        self._items, self._bytes = [], 0
        return part


def _copied(image: Any) -> Any:
    """An array's or PIL image's copy, which nobody changes or closes; or the error of one that cannot be read."""
    try:
        copy = image.copy()
        if hasattr(image, "getexif") and (exif := image.getexif()):  # a copy of a TIFF would lose it
            copy.info["exif"] = exif.tobytes()
        return copy
    except Exception as error:  # a PIL image is read when it is first looked at
        return _corrupt(error)


def _corrupt(error: Exception) -> ImageCorrupt:
    return ImageCorrupt(f"the image cannot be read: {error or type(error).__name__}")


def _text_size(text: Any) -> int:
    if not isinstance(text, str):
        raise TypeError(f"a text is a str, not {type(text).__name__}")
    return len(text)


def _image_kind(image: Any) -> tuple[Kind, int]:
    """The kind of an image, and about how many bytes it will have."""
    if isinstance(image, (bytes, bytearray, memoryview)):
        return "files", len(image)
    if isinstance(image, str) and image.startswith(_ADDRESSES):
        return "addresses", len(image)
    if isinstance(image, (str, os.PathLike)):
        try:
            return "files", Path(image).stat().st_size
        except (OSError, ValueError):
            return "files", 0  # reading it says what is wrong
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
            raise TypeError(
                f"an array of an image is uint8 (H, W), (H, W, 3) or (H, W, 4), not {image.dtype} {image.shape}"
            )
        return "files", image.nbytes
    if hasattr(image, "save") and hasattr(image, "mode"):
        return "files", 3 * image.width * image.height
    raise TypeError(
        f"an image is a path, an address, the bytes of a file, an array or a PIL image, not {type(image).__name__}"
    )


def content_of(image: Any) -> bytes:
    """An image file's bytes. Raises ImageNotFound, ImageUnreadable or ImageCorrupt."""
    if isinstance(image, ImageCorrupt):
        raise image
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, np.ndarray):
        return png(image)
    if not isinstance(image, (str, os.PathLike)):
        try:
            return _png_of_pil(image)
        except Exception as error:
            raise _corrupt(error) from error
    try:
        return Path(image).read_bytes()
    except FileNotFoundError:
        raise ImageNotFound(f"there is no file {str(image)!r}") from None
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise ImageUnreadable(f"{str(image)!r} cannot be read: {error}") from None


def check_text(text: str) -> None:
    """Raises InvalidRequest for a text that no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text holds a lone surrogate at character {error.start}") from None


def png(array: np.ndarray) -> bytes:
    """The PNG file of an array uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), without Pillow."""
    height, width = array.shape[:2]
    channels = array.shape[2] if array.ndim == 3 else 1
    rows = np.ascontiguousarray(array).reshape(height, width * channels)
    filtered = np.empty((height, 1 + width * channels), np.uint8)
    filtered[:, 0] = 1  # each byte less its neighbour on the left, which packs photographs better
    filtered[:, 1:] = rows
    filtered[:, 1 + channels :] -= rows[:, :-channels]
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 1)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _png_of_pil(image: PilImage) -> bytes:
    file = BytesIO()
    exif = image.getexif()  # its orientation
    plain = image if image.mode in _PNG_MODES else image.convert("RGB")
    plain.save(file, "PNG", compress_level=1, **({"exif": exif} if exif else {}))
    return file.getvalue()


def request(part: Part, sent: Sequence[Any], on_error: str, options: dict[str, str]) -> dict[str, Any]:
    """The arguments of Connection.ask for a part, of which `sent` are the files' bytes, the texts or the addresses."""
    options = {**options, "encoding_format": "base64", "on_error": on_error}
    if part.kind == "files":
        uploads = [("files", (f"{number}", content, "application/octet-stream")) for number, content in enumerate(sent)]
        return {"method": "POST", "path": "/v1/embeddings/images", "files": uploads, "params": options}
    items = list(sent) if part.kind == "texts" else [{"image": address} for address in sent]
    return {"method": "POST", "path": "/v1/embeddings", **_json({"input": items, **options})}


def rank_request(query: Any, candidates: Sequence[Any], options: dict[str, str]) -> dict[str, Any]:
    asked = {"query": _item(query), "candidates": [_item(candidate) for candidate in candidates], **options}
    return {"method": "POST", "path": "/v1/rank", **_json(asked)}


def _item(item: Any) -> Any:
    if isinstance(item, str):
        return {"image": item} if item.startswith(_ADDRESSES) else item
    _image_kind(item)  # TypeError for what is none
    return {"image": base64.b64encode(content_of(item)).decode()}


def _json(body: Any) -> dict[str, Any]:
    return {"content": json.dumps(body).encode(), "headers": {"Content-Type": "application/json"}}


def read_embeddings(answer: httpx.Response, part: Part) -> list[Embedding]:
    """The embeddings of an answer to `request`. Raises Unavailable for an answer that is none."""
    with _own(answer):
        body = answer.json()
        fingerprint = str(body["fingerprint"])
        found = [_embedding(row, part.first + place, fingerprint) for place, row in enumerate(body["data"])]
        if len(found) != len(part.items):
            raise ValueError(f"{len(found)} vectors for {len(part.items)} items")
        if len({each.vector.shape for each in found if each.vector is not None}) > 1:
            raise ValueError("vectors of different lengths")
        return found


def _embedding(row: dict[str, Any], index: int, fingerprint: str) -> Embedding:
    if error := row.get("error"):
        kind = errors.by_code(error["code"]) or errors.InvalidRequest
        return Embedding(index, None, kind(error["message"], index=index), fingerprint=fingerprint)
    return Embedding(index, from_base64(row["embedding"]), None, row.get("truncated", False), fingerprint)


def read_ranking(answer: httpx.Response) -> list[Ranked]:
    with _own(answer):
        return [Ranked(row["index"], row["score"], row["probability"]) for row in answer.json()["results"]]


def read_models(answer: httpx.Response) -> list[dict[str, Any]]:
    with _own(answer):
        models = answer.json()["data"]
        if not isinstance(models, list):
            raise ValueError("no list of models")
        return models


@contextmanager
def _own(answer: httpx.Response) -> Iterator[None]:
    """Unavailable for an answer of 200 that no service of ours gives, such as a web page's."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable(f"{answer.url} gave an answer that is none of clipfleet's: {error!r}") from error
