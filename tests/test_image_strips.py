"""Long strips are resized without the memory of the whole, and with the same pixels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipfleet import resize
from clipfleet.checkpoint import PixelSpec
from clipfleet.errors import ImageTooManyPixels
from clipfleet.images import decode
from tests.pictures import picture
from tests.reference import CLIP, CLIP_WIDE, SIGLIP, Processor, reference_pixels, spec_of

ROOT = Path(__file__).parent.parent


@pytest.fixture
def strips_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "_WHOLE_PIXELS", 0)


@pytest.mark.usefixtures("strips_only")
@pytest.mark.parametrize("processor", [CLIP, CLIP_WIDE, SIGLIP], ids=["clip", "clip-wide", "siglip"])
def test_the_two_passes_equal_the_whole_resize(processor: Processor) -> None:
    rng = np.random.default_rng(3)
    sizes = [(900, 4), (4, 900), (700, 31), (31, 700), (57, 56), (56, 57), (1, 1), *rng.integers(1, 300, (120, 2))]
    for width, height in sizes:
        image = picture("RGB", int(width), int(height))
        expected = reference_pixels(image, processor)
        assert np.array_equal(decode(image, spec_of(processor)).pixels, expected), (width, height)


@pytest.mark.usefixtures("strips_only")
@pytest.mark.parametrize("resample", [0, 1, 2, 4, 5])
def test_the_two_passes_equal_the_whole_resize_with_other_filters(resample: int) -> None:
    processor = type(CLIP)(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, resample=resample)
    for width, height in [(400, 33), (33, 400), (90, 120), (60, 200), (13, 17)]:
        image = picture("RGB", width, height)
        assert np.array_equal(decode(image, spec_of(processor)).pixels, reference_pixels(image, processor))


@pytest.mark.parametrize(("width", "height"), [(5000, 20), (20, 5000)])
def test_a_strip_at_the_real_threshold_equals_the_reference(width: int, height: int) -> None:
    processor = type(CLIP)()  # 224 px: 56,000 x 224 as a whole
    image = picture("RGB", width, height)
    assert np.array_equal(decode(image, spec_of(processor)).pixels, reference_pixels(image, processor))


def test_an_intermediate_over_the_limit_is_refused() -> None:
    spec = PixelSpec(224, None, (224, 224), 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ImageTooManyPixels, match=r"intermediate.*the limit is 64,000,000") as caught:
        decode(picture("L", 1, 300_000), spec)
    assert caught.value.code == "image_too_many_pixels"


# The limit holds for the whole address space, so libraries get one thread each.
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2_000_000_000, 2_000_000_000))
import numpy as np
from PIL import Image
from clipfleet import load_image
from clipfleet.errors import ImageTooManyPixels
for size in ((1, 60000), (60000, 1), (20000, 1), (1, 20000), (7, 60000), (60000, 3)):
    for mode in ("L", "RGBA"):
        try:
            pixels = load_image(Image.effect_noise(size, 90).convert(mode))
            print(size, mode, "->", pixels.shape, len(np.unique(pixels)) > 4)
        except ImageTooManyPixels as error:
            print(size, mode, "->", error.code)
# Not ru_maxrss: a new process starts with the peak of the one that started it.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("done", int(peak.split()[1]) // 1024 < 1200)
"""


def test_strips_fit_in_two_gigabytes() -> None:
    done = run_limited(LIMITED)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "done True", done.stdout + done.stderr
    # Columns are cut before rows are made; rows cannot be cut before they are made, so tall strips are refused.
    wide, tall = "(224, 224, 3) True", "image_too_many_pixels"
    assert [line.split(" -> ")[1] for line in lines[:-1]] == 2 * [tall] + 4 * [wide] + 4 * [tall] + 2 * [wide]


BOMB = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2_000_000_000, 2_000_000_000))
import struct, zlib
from clipfleet import load_image
from clipfleet.errors import ImageError

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

def png(width, height, colour, rows=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\\x89PNG\\r\\n\\x1a\\n" + b"".join(chunks)

whole = bytes(8000 * 3 + 1) * 8000
for name, data in {
    "64 megapixels that follow": png(8000, 8000, 2, whole),
    "64 megapixels that do not follow": png(8000, 8000, 6),
    "one row too many": png(8000, 8001, 2, whole),
    "the largest header": png(2**31 - 1, 2**31 - 1, 6),
}.items():
    try:
        print(name, len(data) < 200_000, load_image(data).shape)
    except ImageError as error:
        print(name, len(data) < 200_000, error.code)
"""


def test_small_files_of_many_pixels_fit_in_two_gigabytes() -> None:
    done = run_limited(BOMB)
    assert done.stdout.splitlines() == [
        "64 megapixels that follow True (224, 224, 3)",
        "64 megapixels that do not follow True image_corrupt",
        "one row too many True image_too_many_pixels",
        "the largest header True image_too_many_pixels",
    ], done.stderr


def run_limited(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
