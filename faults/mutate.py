"""Image files of every accepted format, and what can be done to them."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

SIZES = ((1, 1), (7, 300), (64, 48), (300, 200), (900, 700))
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

# Format, the modes that it keeps, and the options of Image.save that change how a file is built.
KINDS: tuple[tuple[str, tuple[str, ...], tuple[dict[str, object], ...]], ...] = (
    ("JPEG", ("RGB", "L", "CMYK"), ({}, {"progressive": True}, {"subsampling": 0, "optimize": True})),
    ("PNG", ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), ({}, {"optimize": True})),
    ("WEBP", ("RGB", "RGBA"), ({}, {"lossless": True})),
    ("GIF", ("P", "L"), ({}, {"interlace": 1})),
    ("BMP", ("RGB", "L", "1", "RGBA"), ({},)),
    (
        "TIFF",
        ("RGB", "L", "1", "RGBA", "F", "I;16"),
        ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}),
    ),
    ("AVIF", ("RGB", "RGBA"), ({},)),
)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    exif[0x010E] = "a description " * 20
    return exif


def seeds() -> list[bytes]:
    """Whole files: every format, mode and way of building it, with metadata and with several frames."""
    rng = np.random.default_rng(5)
    found = []
    for kind, modes, ways in KINDS:
        for mode in modes:
            for number, way in enumerate(ways):
                size = SIZES[(len(found) + number) % len(SIZES)]
                noise = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
                image = Image.fromarray(noise, "RGBA")
                if mode == "I;16":
                    image = Image.fromarray(noise[:, :, :2].copy().view(np.uint16)[:, :, 0])
                elif mode in ("P", "CMYK", "F", "L", "1"):
                    image = image.convert("RGB").convert(mode)
                else:
                    image = image.convert(mode)
                more = {} if kind in ("BMP", "GIF") else {"exif": _exif().tobytes()}
                file = io.BytesIO()
                image.save(file, kind, **way, **more)  # type: ignore[arg-type]
                found.append(file.getvalue())
    frames = [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(4)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        found.append(file.getvalue())
    return found


def large() -> Iterator[tuple[str, bytes]]:
    """Small files of as many pixels as the limits allow: name and bytes. Flat, because that is quick to write."""
    wide = Image.new("RGB", (8000, 8000), "teal")
    for kind, mode, way in (
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True, "exif": _exif().tobytes()}),
        ("JPEG", "CMYK", {}),
        ("PNG", "L", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "I;16", {}),
        ("GIF", "P", {}),
        ("BMP", "1", {}),
        ("TIFF", "RGB", {"compression": "tiff_deflate"}),
        ("TIFF", "F", {"compression": "tiff_lzw"}),
        ("AVIF", "RGB", {"speed": 10}),
        ("AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"}),
    ):
        yield (
            f"{kind} {mode}{' progressive, turned' if 'exif' in way else ''}",
            _saved(_in_mode(wide, mode), kind, **way),
        )
    yield "WEBP RGBA", _saved(Image.new("RGBA", (16_000, 4000), (0, 128, 128, 99)), "WEBP", lossless=True, method=0)
    yield "PNG, a column", _saved(Image.new("L", (1, 64_000_000)), "PNG")
    yield "PNG, a narrow column", _saved(Image.new("RGBA", (228, 280_000)), "PNG")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return Image.new("I;16", image.size, 9000) if mode == "I;16" else image.convert(mode)


def _saved(image: Image.Image, kind: str, **way: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **way)  # type: ignore[arg-type]
    return file.getvalue()


def _flip(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    for _bit in range(rng.choice((1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _head(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    """An extreme number among the first bytes, where sizes stand."""
    width = rng.choice((1, 2, 4))
    at = rng.randrange(min(len(data), 400))
    value = rng.choice(EXTREMES) & (256**width - 1)
    data[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))


def _cut(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    del data[rng.randrange(1, len(data)) :]


def _remove(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 4, 100))]


def _repeat(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    at, length = rng.randrange(len(data)), rng.choice((4, 50, 2000))
    data[at:at] = data[at : at + length] * rng.choice((1, 2, 200))


def _noise(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    at = rng.randrange(len(data))
    piece = rng.randbytes(rng.choice((1, 16, 400)))
    data[at : at + len(piece)] = piece


def _splice(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    """The head of this file, the tail of another."""
    other = rng.choice(others)
    data[rng.randrange(1, len(data)) :] = other[rng.randrange(len(other)) :]


def _polyglot(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    data += rng.choice((b"%PDF-1.7\n", b"PK\x03\x04", b"<svg><script>", b"#!/bin/sh\n", rng.choice(others)))


def _bomb(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    """A small file that says it is large."""
    width, height = rng.choice(((8000, 8000), (65500, 65500), (2**31 - 1, 1), (1, 2**31 - 1), (60000, 1060)))
    if data.startswith(b"\x89PNG"):
        data[16:24] = struct.pack(">II", width, height)
    elif data.startswith(b"GIF8"):
        data[6:10] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    elif data.startswith(b"BM"):
        data[18:26] = struct.pack("<II", width, height)
    elif (at := max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))) > 0:
        data[at + 5 : at + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    else:
        _head(rng, data, [])


MUTATIONS: tuple[Callable[[random.Random, bytearray, list[bytes]], None], ...] = (
    _flip, _flip, _head, _head, _cut, _remove, _repeat, _noise, _splice, _polyglot, _bomb,
)  # fmt: skip


def mutants(seed: int) -> Iterator[bytes]:
    """Damaged files without end; the same ones for the same seed."""
    rng, originals = random.Random(seed), seeds()
    while True:
        data = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if len(data) > 1:
                rng.choice(MUTATIONS)(rng, data, originals)
        yield bytes(data)
