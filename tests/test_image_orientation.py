"""EXIF orientation: applied by default, a setting, and harmless where it is damaged."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from clipfleet.image_files import DEFAULT_LIMITS
from clipfleet.images import decode
from tests.pictures import encode, picture
from tests.reference import CLIP, reference_pixels, spec_of

SPEC = spec_of(CLIP)
AS_STORED = replace(DEFAULT_LIMITS, exif_orientation=False)


def turned(orientation: object, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(picture(mode, 130, 80), kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_equals_the_reference_on_the_turned_image(kind: str, orientation: int) -> None:
    data = turned(orientation, kind)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        decoded = decode(data, SPEC)
        assert np.array_equal(decoded.pixels, reference_pixels(upright, CLIP))
        assert (decoded.width, decoded.height) == upright.size


def test_an_image_in_memory_is_turned_too() -> None:
    data = turned(6)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decode(image, SPEC).pixels, decode(data, SPEC).pixels)


def test_orientation_can_be_switched_off() -> None:
    data = turned(6)
    decoded = decode(data, SPEC, AS_STORED)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decoded.pixels, reference_pixels(image, CLIP))
    assert (decoded.width, decoded.height) == (130, 80)
    assert not np.array_equal(decoded.pixels, decode(data, SPEC).pixels)


def test_transparency_survives_the_turn() -> None:
    data = turned(8, "PNG", "P")
    with Image.open(io.BytesIO(data)) as image:
        image.info["transparency"] = 3
        expected = reference_pixels(ImageOps.exif_transpose(image), CLIP)
        assert np.array_equal(decode(image, SPEC).pixels, expected)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_ignored(orientation: object) -> None:
    data = turned(orientation)
    assert np.array_equal(decode(data, SPEC).pixels, decode(data, SPEC, AS_STORED).pixels)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow says what is wrong with the metadata
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03" * 4,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x63\0\x01\0\0\0\x06\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\x7f\x06\0\0\0",
        b"Exif\0\0garbage" * 20,
        b"\0" * 64,
    ],
)
def test_malformed_exif_is_harmless(exif: bytes) -> None:
    plain = encode(picture("RGB", 130, 80), "JPEG")
    damaged = plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:]
    assert np.array_equal(decode(damaged, SPEC).pixels, decode(plain, SPEC).pixels)
