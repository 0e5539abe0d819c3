"""16-bit, 32-bit and float grey: the reference saturates these, so their golden pixels are computed here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipfleet.checkpoint import PixelSpec
from clipfleet.errors import ImageCorrupt
from clipfleet.images import decode
from tests.pictures import encode

# An image of the checkpoint's own size is not resampled, so its pixels are the scaled values.
UNSCALED = PixelSpec(None, (4, 4), None, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)


def grey(values: Any, dtype: type) -> np.ndarray:
    """The pixels of a 4 x 4 image of these 16 values, which must come out grey."""
    pixels = decode(Image.fromarray(np.asarray(values, dtype).reshape(4, 4)), UNSCALED).pixels
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0].ravel()


SIXTEEN = [0, 1, 127, 128, 129, 257, 385, 386, 1000, 12345, 32767, 32768, 50000, 65000, 65406, 65535]


def test_16_bit_is_scaled_from_0_to_65535() -> None:
    expected = [round(value * 255 / 65535) for value in SIXTEEN]
    assert expected[:5] == [0, 0, 0, 0, 1] and expected[-1] == 255
    assert grey(SIXTEEN, np.uint16).tolist() == expected


def test_16_bit_keeps_its_scale_when_values_are_few() -> None:
    assert grey([257 * 10] * 8 + [257 * 20] * 8, np.uint16).tolist() == [10] * 8 + [20] * 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_files_are_scaled_the_same(kind: str) -> None:
    data = encode(Image.fromarray(np.asarray(SIXTEEN, np.uint16).reshape(4, 4)), kind)
    assert decode(data, UNSCALED).pixels[:, :, 0].ravel().tolist() == grey(SIXTEEN, np.uint16).tolist()


def test_big_endian_16_bit_is_scaled_the_same() -> None:
    swapped = np.asarray(SIXTEEN, ">u2").tobytes()
    image = Image.frombytes("I;16B", (4, 4), swapped)
    assert decode(image, UNSCALED).pixels[:, :, 0].ravel().tolist() == grey(SIXTEEN, np.uint16).tolist()


def test_32_bit_within_0_to_65535_is_scaled_from_there() -> None:
    assert grey(SIXTEEN, np.int32).tolist() == [round(value * 255 / 65535) for value in SIXTEEN]


@pytest.mark.parametrize("values", [range(-8, 8), range(65535, 65551), [-(2**31), *[0] * 14, 2**31 - 1]])
def test_32_bit_beyond_that_is_scaled_from_min_to_max(values: Any) -> None:
    low, high = min(values), max(values)
    assert grey(list(values), np.int32).tolist() == [round((value - low) * 255 / (high - low)) for value in values]


def test_float_within_0_to_1_is_scaled_from_there() -> None:
    values = [number / 20 for number in range(16)]  # 0 .. 0.75
    expected = [round(float(np.float32(value)) * 255) for value in values]
    assert expected[-1] == 191
    assert grey(values, np.float32).tolist() == expected


@pytest.mark.parametrize("values", [[number * 2.0 for number in range(16)], [number - 3.5 for number in range(16)]])
def test_float_beyond_that_is_scaled_from_min_to_max(values: list[float]) -> None:
    expected = [round(number * 255 / 15) for number in range(16)]
    assert grey(values, np.float32).tolist() == expected


def test_a_flat_image_beyond_the_range_is_black() -> None:
    assert grey([70000] * 16, np.int32).tolist() == [0] * 16
    assert grey([7.5] * 16, np.float32).tolist() == [0] * 16


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_corrupt(bad: float) -> None:
    image = Image.fromarray(np.asarray([0.5] * 15 + [bad], np.float32).reshape(4, 4))
    with pytest.raises(ImageCorrupt, match="not finite"):
        decode(encode(image, "TIFF"), UNSCALED)
