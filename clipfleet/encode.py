"""Vectors of a handful of texts and image files, for `clipfleet encode`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipfleet.encoder import Encoder
from clipfleet.errors import ImageError, JobError
from clipfleet.images import decode

_BATCH = 32


class Row(NamedTuple):
    """One input's result."""

    input: str
    embedding: np.ndarray | None  # (d,) float32; None where it failed
    error: str | None  # its code
    dimension: int


def encode_all(model: str, device: str, texts: Sequence[str], images: Sequence[Path]) -> Iterator[Row]:
    """Encode texts, then image files, in order, a batch at a time. Raises CheckpointError, DeviceUnavailable."""
    towers = [tower for tower, wanted in (("text", texts), ("image", images)) if wanted]
    encoder = Encoder(model, device, towers=towers)  # type: ignore[arg-type]
    for start in range(0, len(texts), _BATCH):
        chunk = texts[start : start + _BATCH]
        for text, vector in zip(chunk, encoder.encode_texts(chunk).vectors, strict=True):
            yield Row(text, vector, None, encoder.dimension)
    for start in range(0, len(images), _BATCH):
        yield from _encode_images(encoder, images[start : start + _BATCH])


def _encode_images(encoder: Encoder, paths: Sequence[Path]) -> Iterator[Row]:
    decoded = [_decode(encoder, path) for path in paths]
    good = [pixels for pixels in decoded if isinstance(pixels, np.ndarray)]
    vectors = iter(encoder.encode_pixels(np.stack(good)) if good else ())
    for path, outcome in zip(paths, decoded, strict=True):
        if isinstance(outcome, np.ndarray):
            yield Row(_printable(path), next(vectors), None, encoder.dimension)
        else:
            yield Row(_printable(path), None, outcome.code, encoder.dimension)


def _printable(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()  # a name need not be valid Unicode


def _decode(encoder: Encoder, path: Path) -> np.ndarray | ImageError:
    try:
        return decode(path, encoder.checkpoint.pixels).pixels
    except ImageError as error:
        return error


def save_npy(rows: Iterable[Row], out: Path, on_error: Callable[[Row], None]) -> int:
    """Write rows as one .npy (n, d) float32, failed ones as NaN; returns how many failed. Raises JobError."""
    failed = 0
    vectors = []
    for row in rows:
        if row.embedding is None:
            failed += 1
            on_error(row)
        vectors.append(np.full(row.dimension, np.nan, np.float32) if row.embedding is None else row.embedding)
    try:
        with out.open("wb") as file:  # np.save would append .npy to the name that was asked for
            np.save(file, np.stack(vectors), allow_pickle=False)
    except OSError as error:
        raise JobError(f"cannot write {str(out)!r}: {error.strerror or error}") from error
    return failed
