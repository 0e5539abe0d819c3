"""Directories of tags, a TIFF's own and those of EXIF data, checked before Pillow and libtiff build what they promise."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from clipfleet.errors import ImageCorrupt, ImageFormatUnsupported

_ENTRIES = 4096  # libtiff takes no more
_MOST_ENTRIES = 0xFFFF  # that there can be
_PREFIX = b"Exif\0\0"
_VALUES = 1_000  # of a tag that Pillow reads while it opens a file: an object of Python each
_COLORS = 3 * 65536
_MOST_RATIONALS, _MOST_NUMBERS = 10_000, 1_000_000  # of all tags: some images have Pillow read each of them
# Bytes that values may take beyond those that there are: damaged tags say anything.
_OVERLAP = 16 * 1024 * 1024
_PARTS = 100_000  # strips or tiles, which are an object each too
_FEW_PARTS = 1_000  # are harmless, whatever the image's size

_WIDTH, _LENGTH, _SAMPLES, _ROWS, _PLANAR, _TILE_WIDTH, _TILE_LENGTH = 256, 257, 277, 278, 284, 322, 323
_OFFSETS = {273: "strips", 324: "tiles"}
_COLOR_MAP, _ORIENTATION = 320, 274
_EXIF, _GPS, _INTEROPERABILITY = 34665, 34853, 40965  # directories, which Pillow reads whole
_SIZES = {_WIDTH, _LENGTH, _ROWS, _TILE_WIDTH, _TILE_LENGTH}
_READ_BY_PILLOW = (
    _SIZES
    | {_EXIF, _GPS, _INTEROPERABILITY, _ORIENTATION, _SAMPLES, _PLANAR}
    | {258, 259, 262, 266, 282, 283, 296, 338, 339, 530}
)
_BYTES_TO_PILLOW = {700, 34675}  # XMP and ICC profile
_BYTES = {1, 2, 7}  # the types that take no object a value
_RATIONAL_TYPES = {5, 10}
_NUMBER_TYPES = {3, 4, 6, 8, 9, 11, 12, 13, 16}
_BYTES_OF = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # by type
_INTEGERS = {3: "H", 4: "I", 16: "Q"}  # SHORT, LONG and, in a BigTIFF, LONG8


class _Entry(NamedTuple):
    tag: int
    kind: int
    values: int
    field: bytes  # the value where it fits, else its place


def check_directory(data: bytes) -> None:
    """Raises ImageCorrupt or ImageFormatUnsupported. What is cut off is left to Pillow."""
    if data.startswith(b"MM\0+"):
        # Pillow reads it as a plain TIFF and libtiff does not, so one might see another image
        raise ImageFormatUnsupported("the TIFF is a big-endian BigTIFF; save it as a plain TIFF", format="TIFF")
    order = _order(data)
    numbers: dict[int, int] = {}
    parts = []
    entries = list(_entries(data, order))
    for entry in entries:
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
    exif, gps = _directory(entries, _EXIF, data, order), _directory(entries, _GPS, data, order)
    # Pillow asks for the third where the first directory names it, and takes its place from the second.
    named = any(entry.tag == _INTEROPERABILITY for entry in entries)
    below = _directory(exif, _INTEROPERABILITY, data, order) if named else []
    _check_all([*entries, *exif, *gps, *below], len(data), "TIFF")


def check_exif(data: bytes, *, all_read: bool = False) -> None:
    """The same for the EXIF data of another format, of which one tag is read, or all. Raises ImageCorrupt."""
    start = 0
    while data.startswith(_PREFIX, start):
        start += len(_PREFIX)
        if start > 2 * len(_PREFIX):  # Pillow takes two off, or before 13 one after the other
            raise ImageCorrupt("the EXIF data starts over and over; save the image anew")
    data = data[start:]
    order = _order(data)
    entries = list(_entries(data, order, most=_MOST_ENTRIES))
    for entry in entries:  # damaged ones say anything, and are passed over
        if entry.tag == _ORIENTATION and entry.values <= len(data):
            _check_count(entry, _VALUES, "orientations", "EXIF data")
    if all_read:
        exif = _directory(entries, _EXIF, data, order, _MOST_ENTRIES)
        gps = _directory(entries, _GPS, data, order, _MOST_ENTRIES)
        below = _directory(exif, _INTEROPERABILITY, data, order, _MOST_ENTRIES)
        _check_all([*entries, *exif, *gps, *below], len(data), "EXIF data")
    else:
        _check_bytes(entries, len(data), "EXIF data")


def check_index(data: bytes) -> None:
    """The same for a JPEG's index of pictures (MPF), whose one directory is read whole. Raises ImageCorrupt."""
    _check_all(list(_entries(data, _order(data), most=_MOST_ENTRIES)), len(data), "index of pictures")


def _directory(entries: list[_Entry], tag: int, data: bytes, order: str, most: int = _ENTRIES) -> list[_Entry]:
    """The entries of the directory that the one of this tag leads to."""
    pointers = [entry for entry in entries if entry.tag == tag]
    if len(pointers) > 1:  # each may have thousands of entries, and which of them Pillow follows depends on its version
        raise ImageCorrupt(f"there are {len(pointers):,} of the tag {tag} (save the image anew)", format="TIFF")
    return [found for pointer in pointers for found in _entries(data, order, _place(pointer, order), most)]


def _order(data: bytes) -> str:
    return "<" if data[:2] == b"II" else ">"


def _entries(data: bytes, order: str, start: int | None = None, most: int = _ENTRIES) -> Iterator[_Entry]:
    """Those of the directory at `start`, or of the first."""
    big = data[2:3] == b"+"  # as Pillow sees it
    start_at, count_of, entry_of = (8, "Q", "HHQ8s") if big else (4, "H", "HHI4s")
    try:
        place: int = struct.unpack_from(order + ("Q" if big else "I"), data, start_at)[0] if start is None else start
        (entries,) = struct.unpack_from(order + count_of, data, place)
        place += struct.calcsize(order + count_of)
        if entries > most:
            raise ImageCorrupt(f"a directory of tags has {entries:,} entries; the limit is {most:,}", format="TIFF")
        for number in range(entries):
            yield _Entry(
                *struct.unpack_from(order + entry_of, data, place + number * struct.calcsize(order + entry_of))
            )
    except (struct.error, OverflowError):  # a directory beyond the file's end
        return


def _place(entry: _Entry, order: str) -> int:
    """Where the directory that an entry points to starts: a LONG, IFD or LONG8."""
    letter = {4: "I", 13: "I", 16: "Q"}.get(entry.kind, "9s")
    if entry.values != 1 or struct.calcsize(order + letter) > len(entry.field):
        raise ImageCorrupt(f"the tag {entry.tag} points nowhere (save the image anew)", format="TIFF")
    return struct.unpack_from(order + letter, entry.field)[0]


def _check_all(entries: list[_Entry], length: int, whole: str) -> None:
    there = [entry for entry in entries if entry.values <= length]  # Pillow passes over what cannot be there
    rationals = sum(entry.values for entry in there if entry.kind in _RATIONAL_TYPES)
    numbers = sum(entry.values for entry in there if entry.kind in _NUMBER_TYPES)
    if rationals > _MOST_RATIONALS or numbers > _MOST_NUMBERS:
        raise ImageCorrupt(
            f"the tags of the {whole} have {rationals:,} fractions and {numbers:,} other numbers; the limit is "
            f"{_MOST_RATIONALS:,} and {_MOST_NUMBERS:,} (save it without them)"
        )
    _check_bytes(there, length, whole)


def _check_bytes(entries: list[_Entry], length: int, whole: str) -> None:
    """Each value is a copy, and many may lie in one place; Pillow before 13 makes all of them."""
    sizes = (entry.values * _BYTES_OF.get(entry.kind, 0) for entry in entries)
    together = sum(size for size in sizes if size <= length)
    if together > length + _OVERLAP:
        raise ImageCorrupt(f"the tags of the {whole} have {together:,} bytes, and it {length:,} itself (save it anew)")


def _check_size(entry: _Entry) -> None:
    """libtiff reads sizes in types that Pillow passes over, and would then use some that nobody has checked."""
    if entry.values != 1 or struct.calcsize("<" + _INTEGERS.get(entry.kind, "9s")) > len(entry.field):
        raise ImageCorrupt(
            f"the TIFF's tag {entry.tag}, a size, has {entry.values:,} values of type {entry.kind}; "
            "it takes one of type SHORT or LONG (save the image anew)",
            format="TIFF",
        )


def _value(entry: _Entry, order: str) -> int:
    letter = order + _INTEGERS[entry.kind]
    return struct.unpack_from(letter, entry.field)[0] if struct.calcsize(letter) <= len(entry.field) else 1


def _check_count(entry: _Entry, limit: int, what: str, whole: str = "TIFF") -> None:
    if entry.values > limit:
        raise ImageCorrupt(f"the {whole} has {entry.values:,} {what}; the limit is {limit:,}")


def _parts(tag: int, numbers: dict[int, int]) -> int:
    """Strips or tiles that the image consists of."""
    width, length = numbers.get(_WIDTH, 1), numbers.get(_LENGTH, 1)
    planes = numbers.get(_SAMPLES, 1) if numbers.get(_PLANAR) == 2 else 1
    across, down = numbers.get(_TILE_WIDTH, width), numbers.get(_TILE_LENGTH, length)
    if _OFFSETS[tag] == "strips":
        across, down = width, numbers.get(_ROWS, length)
    return planes * -(-width // max(across, 1)) * -(-length // max(down, 1))
