"""Pictures and texts made from a seed, on which int8 is calibrated and checked.

Half of the pictures show a few things on a plain ground, as drawings and product photographs do: pure colours and flat areas
reach activations that no busy picture reaches.

The others are dead leaves: discs that cover each other, their radii by a power law, shaded and grained. Their edges,
scales and contrasts are distributed much as in photographs (Lee, Mumford and Huang 2001), so no photograph is shipped.
"""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_THINGS = (
    "dog", "cat", "car", "red dress", "running shoe", "leather sofa", "wooden table", "mountain lake", "birthday cake",
    "coffee cup", "bicycle", "city street at night", "child with a kite", "bowl of noodles", "circle", "blue square",
    "silver watch", "beach", "train station", "flowers in a vase", "football match", "old map", "wedding", "rocket",
)  # fmt: skip
_FRAMES = (
    "{}", "a photo of a {}", "a close-up photo of the {}", "a drawing of a {} on a white background", "buy {} online",
    "two people next to a {} in the rain", "a blurry black and white picture of a {}", "{}, studio light, high resolution",
)  # fmt: skip


def pictures(count: int, size: int, seed: int) -> np.ndarray:
    """Pictures (count, size, size, 3) uint8, plain and busy in turns."""
    rng = np.random.default_rng(seed)
    return np.stack([(_busy if number % 2 else _plain)(size, rng) for number in range(count)])


def jpegs(count: int, size: int, seed: int) -> list[bytes]:
    """The same pictures as JPEG files."""
    files = []
    for picture in pictures(count, size, seed):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=88)
        files.append(file.getvalue())
    return files


def _plain(size: int, rng: np.random.Generator) -> np.ndarray:
    ground = (255, 255, 255) if rng.random() < 0.4 else _pure(rng)
    scale = 4  # drawn larger, so that edges are smooth
    image = Image.new("RGB", (size * scale, size * scale), ground)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 4))):
        x, y = rng.uniform(0.25, 0.75, 2) * size * scale
        radius = float(rng.uniform(0.08, 0.45)) * size * scale
        corners = int(rng.integers(3, 13))
        inner = float(rng.choice([1.0, 0.45]))  # a polygon or a star
        turn = float(rng.uniform(0, 2 * np.pi))
        angles = turn + np.arange(2 * corners) * np.pi / corners
        radii = radius * np.where(np.arange(2 * corners) % 2, inner, 1.0)
        outline = [(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]
        draw.polygon(outline, fill=_pure(rng))
        if rng.random() < 0.3:
            hole = radius * float(rng.uniform(0.2, 0.6))
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground)
    array = np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32)
    array = array + rng.normal(0, float(rng.choice([0.0, 3.0])), (size, size, 1))
    return np.clip(array, 0, 255).astype(np.uint8)


def _pure(rng: np.random.Generator) -> tuple[int, int, int]:
    """A saturated colour, or a grey."""
    levels = rng.choice([0, 30, 128, 200, 255], 3) if rng.random() < 0.8 else np.full(3, rng.integers(0, 256))
    return int(levels[0]), int(levels[1]), int(levels[2])


def _busy(size: int, rng: np.random.Generator) -> np.ndarray:
    palette = rng.integers(0, 256, (int(rng.integers(3, 9)), 3))
    image = Image.new("RGB", (size, size), _colour(palette, rng))
    draw = ImageDraw.Draw(image)
    smallest, largest = size / 60, size / float(rng.uniform(1.5, 5))
    for _ in range(int(rng.integers(20, 300))):
        # The density of radii falls with their third power.
        u = float(rng.random())
        radius = (u * largest**-2 + (1 - u) * smallest**-2) ** -0.5
        x, y = rng.uniform(0, size, 2)
        box = (x - radius, y - radius, x + radius, y + radius)
        if rng.random() < 0.7:
            draw.ellipse(box, fill=_colour(palette, rng))
        else:
            draw.rectangle(box, fill=_colour(palette, rng))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 2.0))))
    array = np.asarray(image, np.float32)
    slope = np.linspace(rng.uniform(0.5, 1.2), rng.uniform(0.5, 1.2), size)
    array = array * (slope[:, None, None] if rng.random() < 0.5 else slope[None, :, None])
    array += rng.normal(0, float(rng.uniform(0, 12)), (size, size, 1))
    return np.clip(array, 0, 255).astype(np.uint8)


def _colour(palette: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = np.clip(palette[rng.integers(len(palette))] + rng.normal(0, 20, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def texts(count: int, seed: int) -> list[str]:
    """Captions and queries."""
    rng = random.Random(seed)
    return [rng.choice(_FRAMES).format(rng.choice(_THINGS)) for _ in range(count)]
