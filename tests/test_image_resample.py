"""The compiled resizing gives Pillow's pixels, and is not used where it would not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

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

needs_library = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, so nothing was compiled")


@pytest.fixture
def load_anew() -> Iterator[None]:
    module._compiled.cache_clear()
    yield
    module._compiled.cache_clear()


@needs_library
def test_it_is_in_use_here() -> None:
    assert module.resample(picture("RGB", 90, 60), (56, 56), (0, 0, 56, 56), BICUBIC, False) is not None


@needs_library
@pytest.mark.parametrize("plain", [False, True], ids=["vectors", "plain"])
def test_any_part_of_any_size_equals_pillow(plain: bool) -> None:
    run = module._compiled()
    assert run is not None
    rng = np.random.default_rng(7)
    for number in range(ROUNDS):
        # Few rows or columns too: vectors take several at once and must not read beyond the last.
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
            got = run(image, new, box, resampling, sizes._height_first((width, height), new), plain)
            expected = np.asarray(image.resize(new, resampling).crop(box))
            assert np.array_equal(got, expected), (width, height, new, box, resampling)


@needs_library
def test_an_image_that_pillow_would_split_in_blocks() -> None:
    image = picture("RGB", 2900, 1700)  # 19 MB
    box = (38, 0, 262, 224)
    got = module.resample(image, (382, 224), box, BICUBIC, False)
    assert np.array_equal(got, np.asarray(image.resize((382, 224), BICUBIC).crop(box)))


@needs_library
def test_an_image_in_several_blocks_is_left_to_pillow() -> None:
    Image.core.set_block_size(1 << 16)
    try:
        image = picture("RGB", 400, 300)
        assert module.resample(image, (90, 80), (0, 0, 90, 80), BICUBIC, False) is None
        assert np.array_equal(decode(image, spec_of(CLIP)).pixels, reference_pixels(image, CLIP))
    finally:
        Image.core.set_block_size(module._ONE_BLOCK)


@pytest.mark.usefixtures("load_anew")
def test_without_the_library_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIBRARY", module.LIBRARY.with_name("absent.so"))
    image = picture("RGB", 120, 90)
    assert module.resample(image, (56, 56), (0, 0, 56, 56), BICUBIC, False) is None
    assert np.array_equal(decode(image, spec_of(CLIP)).pixels, reference_pixels(image, CLIP))


@needs_library
@pytest.mark.usefixtures("load_anew")
def test_a_pillow_that_resizes_otherwise_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def another_pillow(image: Image.Image, size: tuple[int, int], resampling: int) -> Image.Image:
        return resize(image, size, resampling).point(lambda value: value ^ 1)

    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", another_pillow)
    image = picture("RGB", 120, 90)
    assert module.resample(image, (56, 56), (0, 0, 56, 56), BICUBIC, False) is None
    assert np.array_equal(decode(image, spec_of(CLIP)).pixels, np.asarray(_by_pillow(image)))


def _by_pillow(image: Image.Image) -> Image.Image:
    size = sizes.target_size(*image.size, spec_of(CLIP))
    (left, right), (top, bottom) = (sizes._kept(size[axis], axis, spec_of(CLIP).crop) for axis in (0, 1))
    return image.resize(size, BICUBIC).crop((left, top, right, bottom))
