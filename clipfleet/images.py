"""From a path, bytes or a PIL image to the uint8 pixels that a checkpoint expects.

At default settings the pixels equal those of the checkpoint's own PIL processor bit for bit (before
normalising), at a fraction of its memory. Nothing here needs torch.
"""

from __future__ import annotations

import io
import os
import stat
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from clipfleet import pixel_memory
from clipfleet.checkpoint import PixelSpec, find_checkpoint
from clipfleet.errors import (
    ClipfleetError,
    ImageCorrupt,
    ImageEmpty,
    ImageFormatUnsupported,
    ImageNotFound,
    ImageTooManyBytes,
    ImageTooManyPixels,
    ImageUnreadable,
)
from clipfleet.resize import check_pixels, pad, resize, target_size

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
)  # fmt: skip
PREPROCESSING_VERSION = 1  # part of the fingerprint: raise it whenever pixels change
_MEGA = 1_000_000
_JPEG_SCANS, _PNG_CHUNKS = 100, 10_000
_SCAN = b"\xff\xda"
_REDUCED_AT_LEAST = 2  # times the wanted size
_STRIP_ROWS = 256  # some conversions go in strips, which bounds the copies that they make


@dataclass(frozen=True)
class ImageLimits:
    """What one image may cost, and how it is read.

    `max_pixels` also bounds the largest intermediate of the resizing. `reduced_jpeg` decodes large JPEGs at a fraction of
    their size: faster, and no longer equal to the reference bit for bit.
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 64 * _MEGA
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
    exif_orientation: bool = True
    reduced_jpeg: bool = False


DEFAULT_LIMITS = ImageLimits()


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


def read_file(path: str | os.PathLike[str], limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Read an image file, but never more than the limit.

    Raises ImageNotFound, ImageUnreadable or ImageTooManyBytes.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageUnreadable(f"{os.fspath(path)!r} is no regular file", path=os.fspath(path))
            _check_bytes(status.st_size, limits)
            data = file.read(limits.max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageNotFound(f"no image file at {os.fspath(path)!r}", path=os.fspath(path)) from error
    except ClipfleetError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ImageUnreadable(f"cannot read {os.fspath(path)!r}: {error}", path=os.fspath(path)) from error
    _check_bytes(len(data), limits)  # the file may have grown since fstat
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO without a writer would block for ever


def _check_bytes(size: int, limits: ImageLimits) -> None:
    if size > limits.max_bytes:
        raise ImageTooManyBytes(
            f"the image has {size:,} bytes; the limit is {limits.max_bytes:,}", bytes=size, limit=limits.max_bytes
        )


def sniff(head: bytes | memoryview) -> str | None:
    """Name the format whose signature `head` (the first 64 bytes or more) starts with, or None."""
    head = bytes(head[:64])
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"BM"):
        return "BMP"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head[4:8] == b"ftyp":
        length = int.from_bytes(head[:4], "big")  # of the box: a brand, a version, and brands it is compatible with
        brands = {head[start : start + 4] for start in (8, *range(16, min(length, len(head)), 4))}
        if brands & {b"avif", b"avis"}:  # others in this container are HEIC and films
            return "AVIF"
    return None


def open_image(data: bytes | bytearray | memoryview, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read an image's header: limits are checked, pixels are not decoded yet. Raises an ImageError."""
    if len(data) == 0:
        raise ImageEmpty("the image has 0 bytes")
    _check_bytes(len(data), limits)
    kind = sniff(memoryview(data))
    if kind is None or kind not in limits.formats:
        found = f"the image is {kind}" if kind else "the first bytes are no signature of an image format"
        raise ImageFormatUnsupported(f"{found}; accepted are {', '.join(limits.formats)}", format=kind)
    _check_parts(data if isinstance(data, bytes) else bytes(data), kind)
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooManyPixels(
            f"the {kind} is over the limit of {limits.max_pixels:,} pixels", limit=limits.max_pixels
        ) from error
    except UnidentifiedImageError as error:
        raise ImageCorrupt(f"the {kind} header does not decode", format=kind) from error
    except Exception as error:  # Pillow's plugins raise whatever their parsing trips over
        raise ImageCorrupt(f"the {kind} header does not decode: {error}", format=kind) from error
    check_pixels(image.width, image.height, limits.max_pixels, "the image")
    if kind == "TIFF":  # Pillow decodes whole tiles, whatever the image's own size
        width, length = (_tag(image, tag) for tag in (ExifTags.Base.TileWidth, ExifTags.Base.TileLength))
        check_pixels(width, length, limits.max_pixels, "a tile of the TIFF")
    return image


def _tag(image: Image.Image, tag: int) -> int:
    value = image.tag_v2.get(tag)  # type: ignore[attr-defined]  # a TiffImageFile
    return value if isinstance(value, int) and value > 0 else 1


def _check_parts(data: bytes, kind: str) -> None:
    """Refuse files whose many small parts take a decoder far longer than their pixels would."""
    if kind == "JPEG":
        # A scan may touch every pixel: 95 bytes cost as much as the rest of the file. Encoders write about ten.
        # The bytes that start one are found in thumbnails too, and in the films that phones append: counted closely if many.
        if data.count(_SCAN) > _JPEG_SCANS and (scans := _count_scans(data)) > _JPEG_SCANS:
            raise ImageCorrupt(f"the JPEG has {scans} scans; the limit is {_JPEG_SCANS}", format=kind)
    elif kind == "PNG":
        chunks, start = 0, 8
        while start + 8 <= len(data):
            chunks += data[start + 4 : start + 8] != b"IDAT"
            if chunks > _PNG_CHUNKS:
                raise ImageCorrupt(f"the PNG has more than {_PNG_CHUNKS:,} chunks beside its pixels", format=kind)
            start += 12 + int.from_bytes(data[start : start + 4], "big")


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


def decoding_bytes(image: Image.Image) -> int:
    """Estimate the memory in bytes that decoding an opened image takes at its peak, before it is resized."""
    # Pillow keeps most modes at 4 bytes a pixel. Measured over that at 62 megapixels: Pillow's WebP and AVIF hold frames of
    # their own, wide greys are copied to be scaled, and a JPEG may be progressive and may be turned.
    copies = {"WEBP": 4, "AVIF": 3, "JPEG": 2, "MPO": 2}.get(image.format or "", 1)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        copies += 2
    elif image.mode not in ("RGB", "L", "1"):
        copies += 1  # converting and turning hold the original as well
    return image.width * image.height * 4 * copies


def to_picture(
    image: Image.Image, spec: PixelSpec, limits: ImageLimits = DEFAULT_LIMITS, *, keep: bool = False
) -> Picture:
    """Decode an opened image to the size that `spec` asks for. Raises an ImageError.

    Without `keep` the image itself may have no pixels afterwards.
    """
    try:
        check_pixels(image.width, image.height, limits.max_pixels, "the image")
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
    for top in range(0, image.height, _STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height))).convert("RGBA")
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
    for top in range(0, len(values), _STRIP_ROWS):
        rows = slice(top, top + _STRIP_ROWS)
        scaled[rows] = np.round((values[rows].astype(np.float64) - float(low)) * (255 / span))
    return scaled
