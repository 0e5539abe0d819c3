"""The AV1 pictures that lie in an AVIF, whose container's own word for their size need not be true, and its EXIF data.

ISO 14496-12 and 23008-12 describe the boxes; what libavif refuses is passed over here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from clipfleet.av1 import Damaged, Frames, Units, frames_of
from clipfleet.errors import ImageCorrupt, ImageTooManyPixels
from clipfleet.tiff_directory import check_exif

_PICTURE, _EXIF = b"av01", b"Exif"
_EXIF_ITEMS = 4  # there is one, and perhaps others of thumbnails
_PICTURES = 10_000  # or entries in the tables that lead to them
_UNITS = 20_000  # of all bitstreams
_FRAMES_OF_ONE = 2  # times the limit of one: decoders keep up to eight hidden ones
_ALL_PICTURES = 8  # times the limit of one: transparency, thumbnails, gain maps and what lies beyond a grid's edges


def check_pictures(data: bytes, max_pixels: int) -> list[Frames]:
    """The pictures in the bitstreams' words; what Pillow would read of the EXIF data is checked with them.

    Raises ImageTooManyPixels or ImageCorrupt.
    """
    found: list[Frames] = []
    exif = largest = frames = together = 0
    units = Units(_UNITS)
    try:
        for kind, item in _items_and_samples(data):
            if kind == _EXIF:
                exif += 1
                if exif > _EXIF_ITEMS:
                    raise Damaged(f"there are more than {_EXIF_ITEMS} of EXIF data")
                check_exif(bytes(item[4:]), all_read=True)
                continue
            picture = frames_of(item, units)
            found.append(picture)
            with_frames = picture.pixels * picture.number
            largest, frames, together = max(largest, picture.pixels), max(frames, with_frames), together + with_frames
            if largest > max_pixels or frames > _FRAMES_OF_ONE * max_pixels or together > _ALL_PICTURES * max_pixels:
                raise ImageTooManyPixels(
                    f"the AVIF decodes to pictures of {largest:,} pixels, {frames:,} with their hidden frames, {together:,} "
                    f"or more together; the limit is {max_pixels:,} for one, {_FRAMES_OF_ONE} times as much with its frames "
                    f"and {_ALL_PICTURES} times as much for all",
                    limit=max_pixels,
                )
    except (Damaged, struct.error, IndexError, OverflowError) as error:
        raise ImageCorrupt(f"the AVIF's pictures cannot be read: {error}", format="AVIF") from error
    return found


def _items_and_samples(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The kind and the bytes of each picture or EXIF data."""
    whole = memoryview(data)
    seen = set()
    for kind, box in _boxes(whole, whole_file=True):
        if kind in (b"meta", b"moov") and kind not in seen:
            seen.add(kind)
            yield from _items(whole, box) if kind == b"meta" else _first_samples(whole, box)


def _boxes(data: memoryview, *, whole_file: bool = False) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and content of each box; a file's last may be cut off."""
    position = count = 0
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        start = position + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start)
            start += 8
        if kind == b"uuid":
            start += 16
        end = len(data) if size == 0 and whole_file else position + size
        if end < start and whole_file:
            return  # libavif goes no further either
        if end < start or (end > len(data) and not whole_file):
            raise Damaged(f"the box {kind!r} is larger than what holds it")
        count += 1
        if count > _PICTURES:
            raise Damaged(f"there are more than {_PICTURES:,} boxes")
        yield kind, data[start:end]
        position = end


def _items(whole: memoryview, meta: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    boxes: dict[bytes, memoryview] = {}
    for kind, box in _boxes(meta[4:]):
        boxes.setdefault(kind, box)
    kinds = dict(_kinds(boxes.get(b"iinf", memoryview(b""))))
    copied = 0
    for item, in_meta, extents in _locations(boxes.get(b"iloc", memoryview(b""))):
        source = boxes.get(b"idat", memoryview(b"")) if in_meta else whole
        parts = [source[start : start + length] for start, length in extents]
        kind = kinds.get(item)
        if kind is None or not any(length for _, length in extents):
            continue
        if len(parts) == 1:
            yield kind, parts[0]
            continue
        copied += sum(map(len, parts))
        if copied > 2 * len(whole):
            raise Damaged("its parts are larger than the file")
        yield kind, memoryview(b"".join(parts))


def _kinds(iinf: memoryview) -> Iterator[tuple[int, bytes]]:
    """Number and kind of each item that is a picture or EXIF data."""
    if not iinf:
        return
    for kind, box in _boxes(iinf[6 if iinf[0] == 0 else 8 :]):
        if kind == b"infe":
            item, item_type = struct.unpack_from(">I2x4s" if box[0] == 3 else ">H2x4s", box, 4)
            if item_type in (_PICTURE, _EXIF):
                yield item, item_type


def _locations(iloc: memoryview) -> Iterator[tuple[int, bool, list[tuple[int, int]]]]:
    """Number of each item, whether it lies in the box idat, and the start and length of its parts."""
    if not iloc:
        return
    version, sizes = iloc[0], struct.unpack_from(">H", iloc, 4)[0]
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    reader = _Reader(iloc, 6)
    width = 4 if version == 2 else 2
    for _ in range(reader.take(width)):
        item = reader.take(width)
        in_meta = version > 0 and reader.take(2) & 15 == 1
        reader.take(2)
        base = reader.take(base_size)
        extents = []
        for _ in range(reader.take(2)):
            reader.take(index_size if version > 0 else 0)
            start = base + reader.take(offset_size)
            extents.append((start, reader.take(length_size)))
        yield item, in_meta, extents


class _Reader:
    def __init__(self, data: memoryview, position: int) -> None:
        self._data, self._position, self._count = data, position, 0

    def take(self, size: int) -> int:
        start, self._position, self._count = self._position, self._position + size, self._count + 1
        if self._position > len(self._data):
            raise Damaged("a table is cut off")
        if self._count > 10 * _PICTURES:
            raise Damaged(f"a table has more than {10 * _PICTURES:,} numbers")
        return int.from_bytes(self._data[start : self._position], "big")


def _first_samples(whole: memoryview, moov: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The first picture of each track, which is the only one that is decoded, and a track's EXIF data."""
    for kind, track in _boxes(moov):
        if kind != b"trak":
            continue
        for meta in _inside(track, b"meta"):
            yield from _items(whole, meta)
        for tables in _inside(track, b"mdia", b"minf", b"stbl"):
            boxes: dict[bytes, memoryview] = {}
            for name, box in _boxes(tables):
                if name in boxes:
                    raise Damaged(f"a track has two of the box {name!r}")
                boxes[name] = box
            if _PICTURE in bytes(boxes.get(b"stsd", b"")[:4096]):
                yield _PICTURE, _first_sample(whole, boxes)


def _inside(box: memoryview, *path: bytes) -> Iterator[memoryview]:
    if not path:
        yield box
        return
    for kind, inner in _boxes(box):
        if kind == path[0]:
            yield from _inside(inner, *path[1:])


def _first_sample(whole: memoryview, boxes: dict[bytes, memoryview]) -> memoryview:
    if b"stsz" not in boxes or (b"stco" in boxes) == (b"co64" in boxes):
        raise Damaged("a track has no table of sizes, or not one of places")
    chunks, sizes = boxes[b"stco" if b"stco" in boxes else b"co64"], boxes[b"stsz"]
    (start,) = struct.unpack_from(">I" if b"stco" in boxes else ">Q", chunks, 8)
    (size,) = struct.unpack_from(">I", sizes, 4)
    if size == 0:
        (size,) = struct.unpack_from(">I", sizes, 12)
    return whole[start : start + size]
