"""Refuses image files whose many small parts take a decoder far longer than their pixels would."""

from __future__ import annotations

from clipfleet.errors import ImageCorrupt
from clipfleet.tiff_directory import check_directory, check_index

_JPEG_SCANS, _JPEG_SEGMENTS, _JPEG_EXIF, _JPEG_FILL = 100, 500, 10, 100_000
_PNG_CHUNKS, _PNG_PIECE, _GIF_BLOCKS = 10_000, 256, 100_000
_SCAN = b"\xff\xda"
_TABLES = (0xDB, 0xDE)


def check_parts(data: bytes, kind: str) -> None:
    """Raises ImageCorrupt or ImageFormatUnsupported. Costs microseconds for what encoders write."""
    if kind == "JPEG":
        _check_segments(data)
        # A scan may touch every pixel: 95 bytes cost as much as the rest of the file. Encoders write about ten.
        # The bytes that start one are found in thumbnails too, and in the films that phones append: counted closely if many.
        if data.count(_SCAN) > _JPEG_SCANS and (scans := _count_scans(data)) > _JPEG_SCANS:
            raise ImageCorrupt(f"the JPEG has {scans} scans; the limit is {_JPEG_SCANS}", format=kind)
    elif kind == "PNG":
        _check_chunks(data)
    elif kind == "GIF":
        _check_blocks(data)
    elif kind == "TIFF":
        check_directory(data)


def _check_segments(data: bytes) -> None:
    """Count what Pillow reads in Python up to the first scan: segments, and bytes of tables and of no segment.

    Cameras write a dozen segments; a film's worth of depth or a large ICC profile may take 300 of 64 KiB each.
    """
    segments, exif, fill, position = 0, 0, 0, 2
    index = b""  # of several pictures, the last of its segments; Pillow reads all of it
    while True:
        start = data.find(b"\xff", position)
        if start < 0 or start + 4 > len(data):
            break
        fill += start - position
        marker = data[start + 1]
        if marker == 0xFF:
            fill, position = fill + 1, start + 1
        elif marker == 0x00 or marker == 0xC8 or 0xD0 <= marker <= 0xD9 or 0xF0 <= marker <= 0xFD:  # have no length
            fill, position = fill + 2, start + 2
        elif marker == _SCAN[1]:
            break
        else:
            segments += 1
            length = max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
            position = start + 2 + length
            exif += marker == 0xE1 and data.startswith(b"Exif\0\0", start + 4)
            if marker == 0xE2 and data.startswith(b"MPF\0", start + 4):
                index = data[start + 8 : position]
            if 0xC0 <= marker <= 0xCF or marker in _TABLES:  # or a frame's header: every byte is read
                fill += length
        if segments > _JPEG_SEGMENTS:
            raise ImageCorrupt(
                f"the JPEG has more than {_JPEG_SEGMENTS} segments before its pixels; save it anew without them",
                format="JPEG",
            )
        if exif > _JPEG_EXIF:  # Pillow joins them, and reads a number of any length from them
            raise ImageCorrupt(
                f"the JPEG has more than {_JPEG_EXIF} segments of EXIF data; save it anew", format="JPEG"
            )
        if fill > _JPEG_FILL:
            raise ImageCorrupt(
                f"the JPEG has more than {_JPEG_FILL:,} bytes of tables and fill before its pixels; save it anew",
                format="JPEG",
            )
    check_index(index)


def _count_scans(data: bytes) -> int:
    """Scans of a JPEG up to its end: what lies in other segments and behind the end is passed over (ITU T.81, annex B)."""
    scans, position = 0, 2
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 3:
        marker = data[position + 1]
        if marker == 0xD9:  # the end
            break
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # these have no length; 00 is a pixel's byte
            position += 1 if marker == 0xFF else 2
            continue
        scans += marker == _SCAN[1]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return scans


def _check_chunks(data: bytes) -> None:
    chunks, start = 0, 8  # each of them, and each piece of the pixels, is a step of Python
    while start + 8 <= len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        chunks += length < _PNG_PIECE or data[start + 4 : start + 8] != b"IDAT"
        if chunks > _PNG_CHUNKS:
            raise ImageCorrupt(
                f"the PNG has more than {_PNG_CHUNKS:,} chunks beside its pixels, or tiny ones", format="PNG"
            )
        start += 12 + length


def _check_blocks(data: bytes) -> None:
    """Count the blocks before a GIF's first image as Pillow reads them, in Python."""
    blocks = _Blocks(data, 13 + (6 << (data[10] & 7) if len(data) > 10 and data[10] & 128 else 0))
    while (start := blocks.byte()) not in (b",", b";", b""):
        if start != b"!":
            continue
        label, block = blocks.byte(), blocks.block()
        if label == b"\xfe" and not block:
            continue  # of an empty comment there is no more; of others Pillow reads on
        if label == b"\xff" and block.startswith(b"NETSCAPE2.0"):
            blocks.block()
        while blocks.block():
            pass


class _Blocks:
    def __init__(self, data: bytes, position: int) -> None:
        self._data, self._position, self._count = data, position, 0

    def byte(self) -> bytes:
        self._count += 1
        if self._count > _GIF_BLOCKS:
            raise ImageCorrupt(
                f"the GIF has more than {_GIF_BLOCKS:,} blocks before its pixels; save it anew", format="GIF"
            )
        self._position += 1
        return self._data[self._position - 1 : self._position]

    def block(self) -> bytes:
        size = self.byte()
        start = self._position
        self._position += size[0] if size else 0
        return self._data[start : self._position]
