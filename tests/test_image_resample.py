"""The compiled resizing gives Pillow's pixels, and is not used where it would not."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipfleet import resample as module
from clipfleet import resize as sizes
from clipfleet.images import decode
from tests.pictures import picture
from tests.reference import CLIP, reference_pixels, spec_of

BICUBIC = Image.Resampling.BICUBIC
ROUNDS = 300

needs_library = pytest.mark.skipif(not module.LIBRARY.exists(), reason="it was installed without a C compiler")


@pytest.fixture
def load_anew() -> Iterator[None]:
    module._compiled.cache_clear()
    yield
    module._compiled.cache_clear()


@pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="not compiled on this machine",
)
def test_it_is_in_use_here() -> None:
    assert module.resample(picture("RGB", 90, 60), (56, 56), (0, 0, 56, 56), BICUBIC) is not None


@needs_library
@pytest.mark.parametrize("plain", [False, True], ids=["vectors", "plain"])
def test_any_part_of_any_size_equals_pillow(plain: bool) -> None:
    run = module._compiled()
    assert run is not None
    rng = np.random.default_rng(7)
    for number in range(ROUNDS):
        # Few rows or columns too: vectors take several at once.
        most = [(12, 700), (700, 12), (90, 90), (500, 500)][number % 4]
        width, height = (int(rng.integers(1, length)) for length in most)
        new = int(rng.integers(1, 250)), int(rng.integers(1, 250))
        left, top = (int(rng.integers(0, length)) for length in new)
        box = left, top, int(rng.integers(left, new[0])) + 1, int(rng.integers(top, new[1])) + 1
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if number % 3 == 0:
            pixels = np.where(pixels > 127, np.uint8(255), np.uint8(0))  # overshoots, so sums have to be clipped
        image = Image.fromarray(pixels)
        for resampling in (BICUBIC, Image.Resampling.BILINEAR):
            got = run(image, new, box, resampling, plain=plain)
            expected = np.asarray(image.resize(new, resampling).crop(box))
            assert np.array_equal(got, expected), (width, height, new, box, resampling)


AT_THE_END = """
import ctypes, mmap, sys
import numpy as np
from clipfleet import resample
resample._compiled()  # sets the types of the arguments
function = ctypes.CDLL(str(resample.LIBRARY)).clipfleet_resample_1
function.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 11, ctypes.c_void_p]
libc = ctypes.CDLL(None)
rng = np.random.default_rng(11)
for _ in range(400):
    width, height = (int(length) for length in rng.integers(1, (700, 90) if rng.random() < 0.5 else (90, 700)))
    target = [int(length) for length in rng.integers(1, 120, 2)]
    size = 4 * width * height
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0  # no access
    address = start + pages * mmap.PAGESIZE - size
    result = np.empty((target[1], target[0], 3), np.uint8)
    for order in (0, 1):
        assert function(address, width, height, *target, 0, 0, *target, 1, order, 0, result.ctypes.data) == 1
print("done")
"""


@needs_library
def test_nothing_is_read_beyond_the_last_pixel() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", AT_THE_END], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@needs_library
def test_an_image_that_pillow_would_split_in_blocks() -> None:
    image = picture("RGB", 2900, 1700)  # 19 MB
    box = (38, 0, 262, 224)
    got = module.resample(image, (382, 224), box, BICUBIC)
    assert np.array_equal(got, np.asarray(image.resize((382, 224), BICUBIC).crop(box)))


@needs_library
def test_an_image_in_several_blocks_is_left_to_pillow() -> None:
    module._compiled()  # which sets it once
    Image.core.set_block_size(1 << 16)
    try:
        image = picture("RGB", 400, 300)
        assert module.resample(image, (90, 80), (0, 0, 90, 80), BICUBIC) is None
        assert np.array_equal(decode(image, spec_of(CLIP)).pixels, reference_pixels(image, CLIP))
    finally:
        Image.core.set_block_size(module._ONE_BLOCK)


@pytest.mark.usefixtures("load_anew")
def test_without_the_library_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIBRARY", module.LIBRARY.with_name("absent.so"))
    image = picture("RGB", 120, 90)
    assert module.resample(image, (56, 56), (0, 0, 56, 56), BICUBIC) is None
    assert np.array_equal(decode(image, spec_of(CLIP)).pixels, reference_pixels(image, CLIP))


@needs_library
@pytest.mark.usefixtures("load_anew")
def test_a_pillow_that_resizes_otherwise_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def another_pillow(image: Image.Image, size: tuple[int, int], resampling: int) -> Image.Image:
        return resize(image, size, resampling).point(lambda value: value ^ 1)

    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", another_pillow)
    image = picture("RGB", 120, 90)
    assert module.resample(image, (56, 56), (0, 0, 56, 56), BICUBIC) is None
    assert np.array_equal(decode(image, spec_of(CLIP)).pixels, np.asarray(_by_pillow(image)))


def _by_pillow(image: Image.Image) -> Image.Image:
    size = sizes.target_size(*image.size, spec_of(CLIP))
    (left, right), (top, bottom) = (sizes._kept(size[axis], axis, spec_of(CLIP).crop) for axis in (0, 1))
    return image.resize(size, BICUBIC).crop((left, top, right, bottom))


@needs_library
@pytest.mark.usefixtures("load_anew")
def test_a_pillow_with_another_order_of_passes_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = module.height_first
    monkeypatch.setattr(module, "height_first", lambda size, target: not rule(size, target))
    assert module.resample(picture("RGB", 120, 90), (56, 56), (0, 0, 56, 56), BICUBIC) is None
