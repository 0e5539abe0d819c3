"""One image from any source, of any size: the pixels are the reference's."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clipfleet
from clipfleet.images import Picture, decode, load_image
from tests.pictures import encode, picture
from tests.reference import CLIP, CLIP_WIDE, SIGLIP, Processor, reference_pixels, spec_of

SIZES = [
    (200, 120), (120, 200), (150, 150), (56, 56), (57, 56), (56, 57), (55, 55), (1, 1), (1, 2), (2, 1), (3, 7),
    (31, 101), (101, 31), (333, 251), (5000, 20), (20, 5000), (999, 1), (1, 999), (1024, 768),
]  # fmt: skip


@pytest.mark.parametrize("processor", [CLIP, CLIP_WIDE, SIGLIP], ids=["clip", "clip-wide", "siglip"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_equal_the_references_at_any_size(processor: Processor, width: int, height: int) -> None:
    image = picture("RGB", width, height)
    decoded = decode(image, spec_of(processor))
    assert np.array_equal(decoded.pixels, reference_pixels(image, processor))
    assert (decoded.width, decoded.height) == (width, height)


def test_pixels_equal_the_references_at_random_sizes() -> None:
    rng = np.random.default_rng(7)
    for width, height in rng.integers(1, 400, (60, 2)).tolist():
        image = picture("RGB", width, height)
        for processor in (CLIP, SIGLIP):
            expected = reference_pixels(image, processor)
            assert np.array_equal(decode(image, spec_of(processor)).pixels, expected), (width, height)


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_the_resampling_is_the_checkpoints(resample: int) -> None:
    processor = type(CLIP)(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, resample=resample)
    image = picture("RGB", 130, 90)
    assert np.array_equal(decode(image, spec_of(processor)).pixels, reference_pixels(image, processor))


def test_a_crop_larger_than_the_resized_image_is_padded_as_the_reference_pads() -> None:
    processor = type(CLIP)(size={"shortest_edge": 20}, crop_size={"height": 33, "width": 30})
    image = picture("RGB", 41, 63)
    assert np.array_equal(decode(image, spec_of(processor)).pixels, reference_pixels(image, processor))


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    data = encode(picture("RGB", 300, 200), "JPEG")
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    expected = load_image(data)
    assert expected.shape == (224, 224, 3) and expected.dtype == np.uint8
    assert expected.flags.c_contiguous and expected.flags.writeable
    for source in (str(path), path, bytearray(data), memoryview(data), Image.open(io.BytesIO(data))):
        assert np.array_equal(load_image(source), expected)


def test_load_image_takes_the_checkpoints_size(checkpoints: dict[str, Path]) -> None:
    image = picture("RGB")
    assert load_image(image, str(checkpoints["siglip"])).shape == (48, 48, 3)
    assert clipfleet.load_image(image, model=str(checkpoints["clip"])).shape == (64, 64, 3)


def test_a_pil_image_is_left_as_it_was() -> None:
    image = picture("RGBA")
    before = image.copy()
    decode(image, spec_of(CLIP))
    assert image == before


def test_eight_threads_decode_the_same() -> None:
    files = [encode(picture("RGB", 200 + 7 * number, 150), kind) for number in range(8) for kind in ("JPEG", "PNG")]

    def pixels(data: bytes) -> np.ndarray:
        return decode(data, spec_of(CLIP)).pixels

    expected = [pixels(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            assert all(map(np.array_equal, pool.map(pixels, files), expected))


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_an_animation_gives_its_first_frame(kind: str, options: dict[str, bool]) -> None:
    frames = [Image.new("RGB", (60, 60), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert decode(data, spec_of(CLIP)).pixels[30, 30].tolist() == [255, 0, 0]


def test_an_animated_avif_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime")]
    data = encode(frames[0], "AVIF", save_all=True, append_images=frames[1:], duration=100, quality=90)
    red, green, blue = decode(data, spec_of(CLIP)).pixels[30, 30].tolist()
    assert red > 240 and green < 15 and blue < 15


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    image = picture("RGB")
    path = tmp_path / "picture.jpg"
    path.write_bytes(encode(image, "PNG"))
    assert np.array_equal(decode(path, spec_of(CLIP)).pixels, decode(image, spec_of(CLIP)).pixels)


def test_a_picture_names_its_fields() -> None:
    assert Picture._fields == ("pixels", "width", "height")
