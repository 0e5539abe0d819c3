"""What there is to embed, before anything of it is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from jobs.places import UNKNOWN, FileState


class Item(NamedTuple):
    """One input. `place` is an encoded local path or URI, or the row of a manifest that holds bytes, or None if null.

    `section` is where in that file the image lies (offset, bytes, bytes of the whole file), if it is a part of it; `error` is
    the code of an input that is known to fail; `state` is what the listing told of the file.
    """

    id: str
    uri: str | None
    place: bytes | int | None
    section: tuple[int, int, int] | None = None
    error: str | None = None
    state: FileState = UNKNOWN


class BytesManifest(NamedTuple):
    """A Parquet file whose rows hold the images' bytes, in `column`, and the size and time (nanoseconds since 1970) that it
    had when the job began: rows are known by their numbers, which are another file's no more."""

    path: str
    column: str
    size: int
    modified: int


@dataclass(frozen=True)
class Source:
    """The inputs, and where their bytes are if a manifest holds them. `shards`: whether they are members of tars."""

    items: Iterable[Item]
    manifest: BytesManifest | None = None
    shards: bool = False
