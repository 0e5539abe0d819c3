"""Formats and modes: pixels equal those of the reference processor bit for bit."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipfleet.images import decode
from tests.pictures import encode, picture
from tests.reference import CLIP, SIGLIP, Processor, reference_pixels, spec_of

# kind, mode, options of saving
SAVED: list[tuple[str, str, dict[str, Any]]] = [
    *(("JPEG", mode, {"quality": 90}) for mode in ("L", "RGB", "CMYK")),
    ("JPEG", "RGB", {"quality": 90, "progressive": True}),
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "P", {"transparency": bytes(range(0, 256, 8))}),
    ("PNG", "L", {"transparency": 128}),
    ("PNG", "RGB", {"transparency": (10, 20, 30)}),
    *(("WEBP", mode, options) for mode in ("RGB", "RGBA") for options in ({"lossless": True}, {"quality": 80})),
    ("GIF", "P", {}),
    ("GIF", "P", {"transparency": 5}),
    ("GIF", "L", {}),
    ("GIF", "1", {}),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")),
    ("TIFF", "RGB", {"compression": "tiff_deflate"}),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    *(("AVIF", mode, {"quality": 80, "speed": 10}) for mode in ("RGB", "RGBA")),
]


@pytest.mark.parametrize("processor", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize(("kind", "mode", "options"), SAVED)
def test_a_file_of_each_format_and_mode(processor: Processor, kind: str, mode: str, options: dict[str, Any]) -> None:
    data = encode(picture(mode), kind, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == kind
        expected = reference_pixels(image, processor)
    assert np.array_equal(decode(data, spec_of(processor)).pixels, expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_a_pil_image_of_each_mode(mode: str) -> None:
    image = picture(mode)
    assert np.array_equal(decode(image, spec_of(CLIP)).pixels, reference_pixels(image, CLIP))


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 8))], ids=["int", "bytes"])
def test_a_pil_palette_image_with_transparency(transparency: int | bytes) -> None:
    image = picture("P")
    image.info["transparency"] = transparency
    pixels = decode(image, spec_of(CLIP)).pixels
    assert np.array_equal(pixels, reference_pixels(image, CLIP))
    del image.info["transparency"]
    assert not np.array_equal(pixels, decode(image, spec_of(CLIP)).pixels), "transparency must matter here"


@pytest.mark.parametrize(("premultiplied", "plain"), [("La", "LA"), ("RGBa", "RGBA")])
def test_premultiplied_alpha_equals_its_plain_kin(premultiplied: str, plain: str) -> None:
    image = picture(premultiplied)
    assert np.array_equal(decode(image, spec_of(CLIP)).pixels, decode(image.convert(plain), spec_of(CLIP)).pixels)


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (56, 56), (255, 0, 0, 0))
    half = Image.new("RGBA", (56, 56), (0, 0, 0, 128))
    assert (decode(clear, spec_of(CLIP)).pixels == 255).all()
    assert (decode(half, spec_of(CLIP)).pixels == 127).all()


def test_compositing_in_strips_leaves_no_seam() -> None:
    image = picture("RGBA", width=70, height=900)  # more rows than one strip
    assert np.array_equal(decode(image, spec_of(SIGLIP)).pixels, reference_pixels(image, SIGLIP))
