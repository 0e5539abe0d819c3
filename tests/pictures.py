"""Pictures of noise in every mode, and their bytes in every format."""

from __future__ import annotations

import io
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
