"""The first directory of a TIFF, checked before Pillow and libtiff build what it promises."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from clipfleet.errors import ImageCorrupt, ImageFormatUnsupported

_ENTRIES = 4096  # libtiff takes no more
_VALUES = 1_000  # of a tag that Pillow reads while it opens a file: an object of Python each
_COLORS = 3 * 65536
_PARTS = 100_000  # strips or tiles, which are an object each too
_FEW_PARTS = 1_000  # are harmless, whatever the image's size

_WIDTH, _LENGTH, _SAMPLES, _ROWS, _PLANAR, _TILE_WIDTH, _TILE_LENGTH = 256, 257, 277, 278, 284, 322, 323
_OFFSETS = {273: "strips", 324: "tiles"}
_COLOR_MAP = 320
_SIZES = {_WIDTH, _LENGTH, _ROWS, _TILE_WIDTH, _TILE_LENGTH}
_READ_BY_PILLOW = _SIZES | {258, 259, 262, 266, 274, _SAMPLES, 282, 283, _PLANAR, 296, 338, 339, 530}
_BYTES_TO_PILLOW = {700, 34675}  # XMP and ICC profile
_BYTES = {1, 2, 7}  # the types that take no object a value
_INTEGERS = {3: "H", 4: "I", 16: "Q"}  # SHORT, LONG and, in a BigTIFF, LONG8


class _Entry(NamedTuple):
    tag: int
    kind: int
    count: int
    field: bytes  # the value where it fits, else its place


def check_directory(data: bytes) -> None:
    """Raises ImageCorrupt or ImageFormatUnsupported. What is cut off is left to Pillow."""
    if data.startswith(
        b"MM\0+"
    ):  # Pillow reads it as a plain TIFF and libtiff does not, so one might see another image
        raise ImageFormatUnsupported("the TIFF is a big-endian BigTIFF; save it as a plain TIFF", format="TIFF")
    order = "<" if data[:2] == b"II" else ">"
    numbers: dict[int, int] = {}
    parts = []
    for entry in _entries(data, order):
        if entry.tag in _SIZES:
            _check_size(entry)
        if entry.tag in _SIZES or (entry.tag in (_SAMPLES, _PLANAR) and entry.kind in _INTEGERS):
            numbers.setdefault(entry.tag, _value(entry, order))
        if entry.tag in _OFFSETS:
            parts.append(entry)
        elif entry.tag in _READ_BY_PILLOW or (entry.tag in _BYTES_TO_PILLOW and entry.kind not in _BYTES):
            _check_count(entry, _VALUES, f"values of tag {entry.tag}")
        elif entry.tag == _COLOR_MAP:
            _check_count(entry, _COLORS, "values of its colour map")
    for entry in parts:
        limit = min(max(_parts(entry.tag, numbers), _FEW_PARTS), _PARTS)
        _check_count(entry, limit, f"{_OFFSETS[entry.tag]} (save it with larger ones)")


def _entries(data: bytes, order: str) -> Iterator[_Entry]:
    big = data[2:4] in (b"+\0", b"\0+")
    start_at, count_of, entry_of = (8, "Q", "HHQ8s") if big else (4, "H", "HHI4s")
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, start_at)
        (entries,) = struct.unpack_from(order + count_of, data, start)
        start += struct.calcsize(order + count_of)
        if entries > _ENTRIES:
            raise ImageCorrupt(
                f"the TIFF's directory has {entries:,} entries; the limit is {_ENTRIES:,}", format="TIFF"
            )
        for number in range(entries):
            yield _Entry(
                *struct.unpack_from(order + entry_of, data, start + number * struct.calcsize(order + entry_of))
            )
    except (struct.error, OverflowError):  # a directory beyond the file's end
        return


def _check_size(entry: _Entry) -> None:
    """libtiff reads sizes in types that Pillow passes over, and would then use some that nobody has checked."""
    if entry.count != 1 or struct.calcsize("<" + _INTEGERS.get(entry.kind, "9s")) > len(entry.field):
        raise ImageCorrupt(
            f"the TIFF's tag {entry.tag}, a size, has {entry.count:,} values of type {entry.kind}; "
            "it takes one of type SHORT or LONG (save the image anew)",
            format="TIFF",
        )


def _value(entry: _Entry, order: str) -> int:
    letter = order + _INTEGERS[entry.kind]
    return struct.unpack_from(letter, entry.field)[0] if struct.calcsize(letter) <= len(entry.field) else 1


def _check_count(entry: _Entry, limit: int, what: str) -> None:
    if entry.count > limit:
        raise ImageCorrupt(f"the TIFF has {entry.count:,} {what}; the limit is {limit:,}", format="TIFF")


def _parts(tag: int, numbers: dict[int, int]) -> int:
    """Strips or tiles that the image consists of."""
    width, length = numbers.get(_WIDTH, 1), numbers.get(_LENGTH, 1)
    planes = numbers.get(_SAMPLES, 1) if numbers.get(_PLANAR) == 2 else 1
    across, down = numbers.get(_TILE_WIDTH, width), numbers.get(_TILE_LENGTH, length)
    if _OFFSETS[tag] == "strips":
        across, down = width, numbers.get(_ROWS, length)
    return planes * -(-width // max(across, 1)) * -(-length // max(down, 1))
