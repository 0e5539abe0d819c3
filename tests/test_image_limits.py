"""What one image may cost: bytes, pixels and formats are checked before memory is spent."""

from __future__ import annotations

import platform
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import pytest
from PIL import Image

from clipfleet.errors import (
    ImageCorrupt,
    ImageError,
    ImageFormatUnsupported,
    ImageTooManyBytes,
    ImageTooManyPixels,
)
from clipfleet.image_files import ImageLimits, decoding_bytes, open_image, read_file
from clipfleet.images import decode
from tests.pictures import TiffEntry, encode, picture, tiff
from tests.reference import CLIP, spec_of

SPEC = spec_of(CLIP)
MEGAPIXELS_64 = ImageLimits().max_pixels


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def headers(width: int, height: int) -> dict[str, bytes]:
    """A small file of each kind whose header promises width x height, as far as its kind can."""
    kinds = ("JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF")
    small = {kind: bytearray(encode(picture("RGB", 16, 16), kind)) for kind in kinds}
    frame = small["JPEG"].index(b"\xff\xc0")
    small["JPEG"][frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    small["GIF"][6:10] = struct.pack("<HH", width, height)
    small["BMP"][18:26] = struct.pack("<ii", width, height)
    start = small["WEBP"].index(b"\x9d\x01\x2a")  # RFC 6386, 9.1: 14 bits each
    small["WEBP"][start + 3 : start + 7] = struct.pack("<HH", min(width, 0x3FFF), min(height, 0x3FFF))
    for tag, size in ((256, width), (257, height)):  # ImageWidth and ImageLength, a LONG each
        entry = small["TIFF"].index(struct.pack("<HHI", tag, 4, 1))
        small["TIFF"][entry + 8 : entry + 12] = struct.pack("<I", size)
    extents = small["AVIF"].index(b"ispe") + 8
    small["AVIF"][extents : extents + 8] = struct.pack(
        ">II", min(width, 2**14), min(height, 2**14)
    )  # libavif takes no more
    return {"PNG": png_header(width, height), **{kind: bytes(data) for kind, data in small.items()}}


def test_defaults_are_20_mib_and_64_megapixels() -> None:
    limits = ImageLimits()
    assert (limits.max_bytes, limits.max_pixels) == (20 * 2**20, 64_000_000)
    assert limits.formats == ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def test_bytes_over_the_limit_are_refused_with_their_number() -> None:
    data = encode(picture("RGB"), "PNG")
    decode(data, SPEC, ImageLimits(max_bytes=len(data)))
    with pytest.raises(ImageTooManyBytes) as caught:
        decode(data, SPEC, ImageLimits(max_bytes=len(data) - 1))
    assert caught.value.data == {"bytes": len(data), "limit": len(data) - 1}


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(2**40)  # a terabyte of holes
    with pytest.raises(ImageTooManyBytes) as caught:
        read_file(path)
    assert caught.value.data["bytes"] == 2**40


def test_pixels_at_the_limit_pass_and_one_more_is_refused() -> None:
    data = encode(picture("RGB", 117, 83), "PNG")
    decode(data, SPEC, ImageLimits(max_pixels=117 * 83))
    with pytest.raises(ImageTooManyPixels) as caught:
        decode(data, SPEC, ImageLimits(max_pixels=117 * 83 - 1))
    assert caught.value.data == {"width": 117, "height": 83, "limit": 117 * 83 - 1}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (9600, 9600), (65000, 65000)])
def test_a_header_that_promises_too_much_is_refused(kind: str, width: int, height: int) -> None:
    assert width * height > MEGAPIXELS_64
    with warnings.catch_warnings():
        # Whether Pillow's own warning about size is an error or nothing, ours comes out.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageTooManyPixels):
            open_image(headers(width, height)[kind])
    with pytest.raises(ImageTooManyPixels):
        decode(headers(width, height)[kind], SPEC)


def test_a_pil_image_over_the_limit_is_refused() -> None:
    with pytest.raises(ImageTooManyPixels):
        decode(picture("L", 100, 100), SPEC, ImageLimits(max_pixels=9_999))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])  # a GIF's screen grows with its first frame
@pytest.mark.parametrize(("width", "height"), [(0, 10), (10, 0), (0, 0)])
def test_a_header_of_no_pixels_is_corrupt(kind: str, width: int, height: int) -> None:
    with pytest.raises(ImageCorrupt):
        decode(headers(width, height)[kind], SPEC)


def test_a_pil_image_of_no_pixels_is_corrupt() -> None:
    with pytest.raises(ImageCorrupt, match="no pixels: 0 x 5"):
        decode(Image.new("RGB", (0, 5)), SPEC)


def test_a_format_can_be_switched_off() -> None:
    data = encode(picture("RGB"), "GIF")
    decode(data, SPEC)
    with pytest.raises(ImageFormatUnsupported, match="the image is GIF; accepted are JPEG, PNG") as caught:
        decode(data, SPEC, ImageLimits(formats=("JPEG", "PNG")))
    assert caught.value.data == {"format": "GIF"}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_the_estimate_of_decoding_covers_the_pixels(mode: str) -> None:
    image = Image.new(mode, (100, 50))
    assert decoding_bytes(image) >= len(image.tobytes())


def compressed_tiff(width: int, height: int, samples: int, *, tile: int = 0, rows: int = 0) -> bytes:
    """A black TIFF of 16 bits in one tile of `tile` x `tile`, or in strips of `rows`."""
    data = zlib.compress(bytes((tile * tile if tile else width * rows) * samples * 2), 1)
    entries: list[TiffEntry] = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, samples, samples * b"\x10\0")]
    entries += [(259, 3, 1, 8), (262, 3, 1, 2), (277, 3, 1, samples), *([(338, 3, 1, 2)] if samples == 4 else [])]
    if tile:
        entries += [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 0), (325, 4, 1, len(data))]
    else:
        strips = -(-height // rows)  # of which only the first is there
        counts = struct.pack("<I", len(data)) * strips
        entries += [(278, 4, 1, rows), (273, 4, 1, 0), (279, 4, strips, counts if strips > 1 else len(data))]
    return tiff(entries, data)


def test_the_estimate_of_decoding_covers_the_strip_or_tile_that_libtiff_holds() -> None:
    strips = [compressed_tiff(2000, 2000, 3, rows=rows) for rows in (2000, 10)]
    tile = compressed_tiff(16, 16, 4, tile=2000)
    whole, in_strips, in_tile = (decoding_bytes(open_image(data)) for data in (*strips, tile))
    assert whole >= 2000 * 2000 * (4 + 6)
    assert 2000 * 2000 * 4 <= in_strips <= 2000 * 2010 * 5
    assert in_tile >= 2000 * 2000 * 8
    assert decoding_bytes(open_image(encode(picture("RGB", 100, 50), "TIFF"))) <= 100 * 50 * 4 + 2000


_PEAK = """
import sys
from pathlib import Path
from clipfleet.image_files import decoding_bytes, open_image

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

image = open_image(Path(sys.argv[1]).read_bytes())
estimate, before = decoding_bytes(image), peak()
image.load()
print(peak() - before, estimate)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="what is measured is Linux'")
@pytest.mark.parametrize(
    "data", [compressed_tiff(2500, 2500, 3, rows=2500), compressed_tiff(16, 16, 4, tile=2500)], ids=["strip", "tile"]
)
def test_a_tiff_takes_no_more_memory_than_estimated(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "one.tif"
    path.write_bytes(data)
    done = subprocess.run([sys.executable, "-c", _PEAK, path], capture_output=True, text=True, check=True)
    taken, estimate = map(int, done.stdout.split())
    assert taken > 30_000_000, "this test shows nothing"
    assert taken < 1.1 * estimate + 5_000_000


def test_opening_decodes_nothing() -> None:
    header = png_header(8000, 8000)
    image = open_image(header)
    assert image.size == (8000, 8000)
    with pytest.raises(ImageError):
        decode(header, SPEC)


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1)])
def test_a_narrow_image_that_cannot_be_resized_is_refused_undecoded(size: tuple[int, int]) -> None:
    """Pillow keeps a pointer for each row: a column of 64 megapixels took 1.3 GB, to be refused in the end."""
    data = encode(Image.new("L", size), "PNG")
    image = open_image(data)
    assert decoding_bytes(image) >= 8_000_000 + 2 * 8 * 2_000_000
    with pytest.raises(ImageTooManyPixels, match="an intermediate of resizing this narrow image"):
        decode(data[:60], spec_of(CLIP))  # its pixels are not even there
