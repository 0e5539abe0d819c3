"""reduced_jpeg: large JPEGs decode at a fraction of their size, close to the whole; nothing else changes."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from clipfleet import CLIPEmbedder
from clipfleet.checkpoint import find_checkpoint
from clipfleet.image_files import DEFAULT_LIMITS
from clipfleet.images import decode
from tests.pictures import encode

SPEC = find_checkpoint("tiny").pixels
REDUCED = replace(DEFAULT_LIMITS, reduced_jpeg=True)


@pytest.fixture(scope="module")
def large() -> Image.Image:
    return Image.fromarray(data.coffee()).resize((2401, 1603), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation:
        exif[0x112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [None, 3, 6, 8])
def test_nearly_the_same_pixels_and_the_whole_size(large: Image.Image, orientation: int | None) -> None:
    content = jpeg(large, orientation)
    whole, reduced = decode(content, SPEC), decode(content, SPEC, REDUCED)
    assert whole[1:] == reduced[1:] == ((1603, 2401) if orientation in (6, 8) else (2401, 1603))
    difference = np.abs(whole.pixels.astype(int) - reduced.pixels).mean()
    assert 0 < difference < 2, "another way to the same picture"


@pytest.mark.parametrize("edge", [300, 447])
def test_a_jpeg_below_twice_the_size_is_decoded_whole(large: Image.Image, edge: int) -> None:
    content = jpeg(large.resize((edge, edge)))
    assert np.array_equal(decode(content, SPEC).pixels, decode(content, SPEC, REDUCED).pixels)


def test_other_formats_and_the_callers_image_stay_as_they_are(large: Image.Image) -> None:
    content = encode(large, "PNG")
    assert np.array_equal(decode(content, SPEC).pixels, decode(content, SPEC, REDUCED).pixels)
    opened = Image.open(io.BytesIO(jpeg(large)))
    assert np.array_equal(decode(opened, SPEC, REDUCED).pixels, decode(jpeg(large), SPEC).pixels)
    assert opened.size == (2401, 1603)


def test_vectors_agree_to_a_cosine_of_0999(large: Image.Image, tmp_path: Path) -> None:
    files = []
    for number, turn in enumerate((0, 90, 180)):
        files.append(tmp_path / f"{number}.jpg")
        files[-1].write_bytes(jpeg(large.rotate(turn, expand=True)))
    vectors = []
    for reduced in (False, True):
        with CLIPEmbedder("tiny", "cpu", reduced_jpeg=reduced) as embedder:
            found = asyncio.run(embedder.generate_embeddings_batch(files, show_progress=False))
            vectors.append(np.stack([vector for vector in found if vector is not None]))
    assert not np.array_equal(*vectors)
    assert (vectors[0] * vectors[1]).sum(1).min() >= 0.999
