"""Images that are wrong in one way each, with the status and the code that they get."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from tests.pictures import encode, picture


class Broken(NamedTuple):
    data: bytes
    status: int
    code: str


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to no pixels behind its header."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(100)))


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


_JPEG = encode(picture("RGB", 300, 200), "JPEG")
_PNG = encode(picture("RGB", 300, 200), "PNG")

BROKEN = {
    "cut JPEG": Broken(_JPEG[: len(_JPEG) // 2], 422, "image_corrupt"),
    "cut PNG": Broken(_PNG[: len(_PNG) // 2], 422, "image_corrupt"),
    "overwritten PNG": Broken(_PNG[:200] + bytes(400) + _PNG[600:], 422, "image_corrupt"),
    "signature alone": Broken(_JPEG[:4], 422, "image_corrupt"),
    "zero size": Broken(png_header(0, 7), 422, "image_corrupt"),
    "no bytes": Broken(b"", 422, "image_empty"),
    "text": Broken(b"this is no picture", 415, "image_format_unsupported"),
    "SVG": Broken(b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415, "image_format_unsupported"),
    "PDF": Broken(b"%PDF-1.7\n", 415, "image_format_unsupported"),
    "3.6 gigapixels": Broken(png_header(60_000, 60_000), 413, "image_too_many_pixels"),
    "a strip": Broken(encode(picture("1", 1, 60_000), "PNG"), 413, "image_too_many_pixels"),
    "over 20 MiB": Broken(_PNG + bytes(20 * 2**20), 413, "image_too_many_bytes"),
}
