"""Pictures of noise in every mode, and their bytes in every format."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(mode: str, width: int = 117, height: int = 83) -> Image.Image:
    """Noise with smooth parts, alpha included, in the given mode."""
    ramp = np.linspace(0, 255, width * height * 4).reshape(height, width, 4)
    rgba = Image.fromarray((noise(height, width, 4) * 0.5 + ramp * 0.5).astype(np.uint8))
    if mode in ("RGBA", "LA", "La", "RGBa"):
        return rgba.convert("RGBA").convert(mode)
    rgb = rgba.convert("RGB")
    if mode == "PA":
        palette = rgb.quantize(32).convert("PA")
        palette.putalpha(rgba.getchannel("A"))
        return palette
    return rgb.quantize(32) if mode == "P" else rgb.convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


TiffEntry = tuple[int, int, int, int | bytes]  # tag, type, count, and the value or the bytes that lie elsewhere


def tiff(entries: list[TiffEntry], pixels: bytes, order: str = "<", big: bool = False) -> bytes:
    """A TIFF of these entries whose pixels lie behind its directory."""
    place, width = ("Q", 8) if big else ("I", 4)
    head = {"<": b"II", ">": b"MM"}[order]
    head += struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8)
    head += struct.pack(order + ("Q" if big else "H"), len(entries))
    end = len(head) + len(entries) * (20 if big else 12) + width
    body = pixels
    for tag, kind, count, value in entries:
        if isinstance(value, bytes):
            field, body = struct.pack(order + place, end + len(body)), body + value
        else:
            value = end if tag in (273, 324) else value
            field = struct.pack(order + {1: "B", 3: "H", 4: "I", 16: "Q"}[kind], value).ljust(width, b"\0")
        head += struct.pack(order + "HH" + place, tag, kind, count) + field
    return head + bytes(width) + body
