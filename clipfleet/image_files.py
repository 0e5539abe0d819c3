"""Image files before their pixels: read under limits, told apart by their signatures, headers opened and checked."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass

from PIL import ExifTags, Image, UnidentifiedImageError

from clipfleet.av1 import Frames
from clipfleet.avif_boxes import check_pictures
from clipfleet.checkpoint import PixelSpec
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
from clipfleet.image_parts import check_parts
from clipfleet.resize import check_pixels, first_step_pixels, target_size
from clipfleet.tiff_directory import check_exif

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
)  # fmt: skip
_MEGA = 1_000_000
STRIP_ROWS = 256  # some conversions go in strips, which bounds the copies that they make
_PICTURES = "clipfleet_pictures"  # of Image.info, where the file's pictures may be larger than the image
_TILES = 2  # times the limit of pixels: they may reach beyond the image's edges
# Of run-length encoded BMPs: Pillow decodes them in Python, and of all that is accepted them alone. A second for so many.
_RLE_PIXELS = 4 * _MEGA


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
    data = data if isinstance(data, bytes) else bytes(data)
    check_parts(data, kind)
    pictures = check_pictures(data, limits.max_pixels) if kind == "AVIF" else []
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
    if any(codec == "bmp_rle" for codec, *_ in image.tile):  # type: ignore[attr-defined]  # an ImageFile
        check_pixels(
            image.width,
            image.height,
            min(_RLE_PIXELS, limits.max_pixels),
            "the BMP is run-length encoded, which decodes slowly (save it uncompressed or as PNG): it",
        )
    if isinstance(exif := image.info.get("exif"), bytes):
        check_exif(exif)
    if pictures:
        image.info[_PICTURES] = pictures
    if kind == "TIFF":
        _check_tiles(image, limits)
    return image


def _check_tiles(image: Image.Image, limits: ImageLimits) -> None:
    """Pillow decodes whole tiles, whatever the image's own size."""
    width, length = _tag(image, ExifTags.Base.TileWidth), _tag(image, ExifTags.Base.TileLength)
    check_pixels(width, length, limits.max_pixels, "a tile of the TIFF")
    across = -(-_tag(image, ExifTags.Base.ImageWidth) // width) * width
    down = -(-_tag(image, ExifTags.Base.ImageLength) // length) * length
    check_pixels(across, down, _TILES * limits.max_pixels, "the TIFF with its tiles' full sizes")


def _tag(image: Image.Image, tag: int) -> int:
    value = image.tag_v2.get(tag)  # type: ignore[attr-defined]  # a TiffImageFile
    return value if isinstance(value, int) and value > 0 else 1


def decoding_bytes(image: Image.Image, spec: PixelSpec | None = None) -> int:
    """Estimate the memory in bytes that an opened image takes at its peak: decoded, and resized as `spec` asks."""
    # Pillow keeps most modes at 4 bytes a pixel. Measured over that at 62 megapixels: Pillow's WebP and AVIF hold frames of
    # their own, wide greys are copied to be scaled, and a JPEG may be progressive and may be turned.
    copies = {"WEBP": 4, "AVIF": 3, "JPEG": 2, "MPO": 2}.get(image.format or "", 1)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        copies += 2
    elif image.mode not in ("RGB", "L", "1"):
        copies += 1  # converting and turning hold the original as well
    pixels = image.width * image.height
    own = max(map(_picture_bytes, image.info.get(_PICTURES, [])), default=0)
    if image.mode in ("L", "1"):
        own = max(own, 5 * pixels)  # a byte each, and RGB
    segment = _segment_bytes(image) if image.format == "TIFF" else 0
    rows = 8 * max(image.size) * (copies + 1)  # a pointer each
    strips = 0 if image.mode == "RGB" else 16 * STRIP_ROWS * image.width
    step = 4 * first_step_pixels(image.size, target_size(*image.size, spec)) if spec else 0
    return max(4 * copies * pixels, own) + segment + rows + strips + step


def _picture_bytes(picture: Frames) -> int:
    """A picture of an AVIF: the decoder's frame and its copy in RGB, and the hidden frames that it keeps, eight at most."""
    frame = 6 if picture.deep else 3  # three values a pixel
    return picture.pixels * (12 + (frame if picture.deep else 0) + frame * min(picture.number - 1, 8))


def _segment_bytes(image: Image.Image) -> int:
    """The strip or tile of a TIFF that libtiff decodes as a whole, beside the image."""
    if not image.use_load_libtiff:  # type: ignore[attr-defined]  # a TiffImageFile; Pillow copies what is not compressed itself
        return 0
    tags = image.tag_v2  # type: ignore[attr-defined]
    width, length = _tag(image, ExifTags.Base.TileWidth), _tag(image, ExifTags.Base.TileLength)
    if ExifTags.Base.TileWidth not in tags and ExifTags.Base.TileLength not in tags:
        width, length = _tag(image, ExifTags.Base.ImageWidth), _tag(image, ExifTags.Base.ImageLength)
        length = min(length, tags.get(ExifTags.Base.RowsPerStrip, length))
    bits = tags.get(ExifTags.Base.BitsPerSample, (1,))
    of_pixel = max(bits) * max(_tag(image, ExifTags.Base.SamplesPerPixel), len(bits))
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 6:  # YCbCr, which libtiff turns into RGBA
        of_pixel = max(of_pixel, 24) + 32
    if image.info.get("compression") == "webp":  # has a frame of its own
        of_pixel *= 2
    return width * length * of_pixel // 8
