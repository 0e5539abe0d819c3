"""Resizing as the reference does, bit for bit, in bounded memory."""

from __future__ import annotations

import numpy as np
from PIL import Image

from clipfleet.checkpoint import PixelSpec
from clipfleet.errors import ImageCorrupt, ImageTooManyPixels
from clipfleet.resample import height_first, resample

# Up to this many pixels Pillow may make the resized image whole, to be cut, as the reference does it.
_WHOLE_PIXELS = 4_000_000
_INTERMEDIATE = "an intermediate of resizing this narrow image"


def resize(image: Image.Image, size: tuple[int, int], spec: PixelSpec, max_pixels: int) -> np.ndarray:
    """Resize an RGB image to `size` (width, height), which is target_size's, and cut it to at most `spec.size`.

    Returns uint8 (H, W, 3). A long strip would need gigabytes as a whole. Pillow resizes in two passes, one for each
    axis; running them one after the other with the part that the crop drops cut between them gives the same bytes.
    """
    width, height = size
    (left, right), (top, bottom) = _kept(width, 0, spec.crop), _kept(height, 1, spec.crop)
    if not _in_passes(size):
        pixels = resample(image, size, (left, top, right, bottom), spec.resample)
        if pixels is not None:
            return pixels
        return np.array(image.resize(size, spec.resample).crop((left, top, right, bottom)))
    for axis in (1, 0) if height_first(image.size, size) else (0, 1):
        step = _step(image.size, size, axis)
        if step != image.size:
            check_pixels(*step, max_pixels, _INTERMEDIATE)
            image = image.resize(step, spec.resample)
        kept = (left, 0, right, image.height) if axis == 0 else (0, top, image.width, bottom)
        if kept != (0, 0, *image.size):
            image = image.crop(kept)
    return np.array(image)


def check_first_step(size: tuple[int, int], target: tuple[int, int], max_pixels: int) -> None:
    """Raise ImageTooManyPixels where resize would, once an image of `size` is decoded."""
    if _in_passes(target):
        check_pixels(*_first_step(size, target), max_pixels, _INTERMEDIATE)


def first_step_pixels(size: tuple[int, int], target: tuple[int, int]) -> int:
    """Pixels of the intermediate that resize makes of a narrow image."""
    width, height = _first_step(size, target) if _in_passes(target) else (0, 0)
    return width * height


def _in_passes(target: tuple[int, int]) -> bool:
    return target[0] * target[1] > _WHOLE_PIXELS


def _first_step(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    return _step(size, target, 1 if height_first(size, target) else 0)


def _step(size: tuple[int, int], target: tuple[int, int], axis: int) -> tuple[int, int]:
    """(width, height) after the pass over one axis."""
    return (target[0], size[1]) if axis == 0 else (size[0], target[1])


def _kept(length: int, axis: int, crop: tuple[int, int] | None) -> tuple[int, int]:
    """Start and end of the centre `crop` (height, width) along one axis (0 is width); what is smaller stays whole."""
    keep = length if crop is None else min(length, crop[1 - axis])
    start = (length - keep) // 2
    return start, start + keep


def target_size(width: int, height: int, spec: PixelSpec) -> tuple[int, int]:
    """(width, height) of the whole picture before it is cut."""
    if spec.shortest_edge is None:
        assert spec.resize is not None
        return spec.resize[1], spec.resize[0]
    edge = spec.shortest_edge
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def pad(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Centre pixels (h, w, 3) that are smaller than `size` on black, the odd row and column first, as the reference."""
    missing = [wanted - have for wanted, have in zip(size, pixels.shape[:2], strict=True)]
    if not any(missing):
        return pixels
    before = [-(-gap // 2) for gap in missing]
    edges = [(first, gap - first) for first, gap in zip(before, missing, strict=True)]
    return np.pad(pixels, [*edges, (0, 0)])  # (H, W, 3) uint8


def check_pixels(width: int, height: int, limit: int, what: str) -> None:
    """Raise ImageTooManyPixels or ImageCorrupt."""
    if width * height > limit:
        raise ImageTooManyPixels(
            f"{what} has {width} x {height} = {width * height:,} pixels; the limit is {limit:,}",
            width=width,
            height=height,
            limit=limit,
        )
    if width < 1 or height < 1:
        raise ImageCorrupt(f"{what} has no pixels: {width} x {height}", width=width, height=height)
