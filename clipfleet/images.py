"""From a path, bytes or a PIL image to the uint8 pixels that a checkpoint expects.

At default settings the pixels equal those of the checkpoint's own PIL processor bit for bit (before
normalising), at a fraction of its memory. Nothing here needs torch.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from clipfleet import pixel_memory
from clipfleet.checkpoint import PixelSpec, find_checkpoint
from clipfleet.errors import ClipfleetError, ImageCorrupt, ImageTooManyPixels
from clipfleet.image_files import DEFAULT_LIMITS, STRIP_ROWS, ImageLimits, open_image, read_file
from clipfleet.resize import check_first_step, check_pixels, pad, resize, target_size

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image

PREPROCESSING_VERSION = 1  # part of the fingerprint: raise it whenever pixels change
_REDUCED_AT_LEAST = 2  # times the wanted size


class Picture(NamedTuple):
    """A decoded image; `width` and `height` are the original's, after orientation."""

    pixels: np.ndarray  # (H, W, 3) uint8, contiguous
    width: int
    height: int


def load_image(source: ImageSource, model: str = "tiny") -> np.ndarray:
    """Decode `source` (path, bytes or PIL image) for the checkpoint `model`.

    Returns uint8 pixels of shape (H, W, 3) at the checkpoint's input size. Raises an ImageError
    that says what is wrong with the image, or a CheckpointError.
    """
    return decode(source, _pixel_spec(model)).pixels


@lru_cache(maxsize=8)
def _pixel_spec(model: str) -> PixelSpec:
    return find_checkpoint(model, weights=False).pixels


def decode(source: ImageSource, spec: PixelSpec, limits: ImageLimits = DEFAULT_LIMITS) -> Picture:
    """Decode one image to the size that `spec` asks for. Raises an ImageError."""
    if isinstance(source, Image.Image):
        # the caller's image stays as it is
        return to_picture(source, spec, replace(limits, reduced_jpeg=False), keep=True)
    data = read_file(source, limits) if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"an image is a path, bytes or a PIL image, not {type(data).__name__}")
    with open_image(data, limits) as image:
        return to_picture(image, spec, limits)


def check_size(image: Image.Image, spec: PixelSpec, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Raise ImageTooManyPixels for an opened image that is too large to decode, or too narrow to resize as `spec` asks."""
    check_pixels(image.width, image.height, limits.max_pixels, "the image")
    # A column of a million pixels takes many times its own memory to decode, to be refused in the end.
    check_first_step(image.size, target_size(*image.size, spec), limits.max_pixels)


def to_picture(
    image: Image.Image, spec: PixelSpec, limits: ImageLimits = DEFAULT_LIMITS, *, keep: bool = False
) -> Picture:
    """Decode an opened image to the size that `spec` asks for. Raises an ImageError.

    Without `keep` the image itself may have no pixels afterwards.
    """
    try:
        check_size(image, spec, limits)
        full = _reduce(image, spec) if limits.reduced_jpeg else None
        with nullcontext() if keep else pixel_memory.lend(image):
            return _to_picture(image, full, spec, limits)
    except ClipfleetError:
        raise
    except MemoryError as error:
        raise ImageTooManyPixels("decoding the image needs more memory than there is") from error
    except Exception as error:  # damaged data surfaces as OSError, SyntaxError, struct.error and whatever else
        kind = image.format or "image"
        raise ImageCorrupt(f"the {kind} is truncated or damaged: {error}", format=image.format) from error


def _to_picture(image: Image.Image, full: tuple[int, int] | None, spec: PixelSpec, limits: ImageLimits) -> Picture:
    image.load()
    turn = _orientation(image) if limits.exif_orientation else None
    if turn is not None:
        image = image.transpose(turn)
    size = image.size  # some formats learn it while loading
    if full is not None:
        size = (full[1], full[0]) if turn in _SWAPS_EDGES else full
    check_pixels(*size, limits.max_pixels, "the image")
    pixels = resize(_to_rgb(image), target_size(*size, spec), spec, limits.max_pixels)
    return Picture(np.ascontiguousarray(pad(pixels, spec.size)), *size)


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_SWAPS_EDGES = [_TRANSPOSE[orientation] for orientation in (5, 6, 7, 8)]


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata is no reason to refuse pixels that decode
        return None
    return _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None


def _reduce(image: Image.Image, spec: PixelSpec) -> tuple[int, int] | None:
    """Let an opened JPEG decode at a half, a quarter or an eighth, but at twice the wanted size or more: closer to it the
    decoder's averaging shows (docs/vectors.md). Returns its whole size, or None where it stays whole."""
    width, height = target_size(*image.size, spec)
    full = image.size
    image.draft(None, (_REDUCED_AT_LEAST * width, _REDUCED_AT_LEAST * height))  # does nothing to other formats
    return full if image.size != full else None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as the reference does: transparency over white, all else by Pillow's own conversion."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied: Pillow converts these to their plain kin alone
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + STRIP_ROWS, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


_FROM_16_BIT = np.round(np.arange(65536) * (255 / 65535)).astype(np.uint8)


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale wide grey values (H, W) to uint8; the reference would saturate them."""
    low, high = values.min(), values.max()  # NaN where there is one
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageCorrupt("the image holds values that are not finite")
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return _FROM_16_BIT[values]
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    span = float(high) - float(low) or 1.0
    scaled = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), STRIP_ROWS):
        rows = slice(top, top + STRIP_ROWS)
        scaled[rows] = np.round((values[rows].astype(np.float64) - float(low)) * (255 / span))
    return scaled
