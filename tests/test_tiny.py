"""The embedded checkpoint knows its world, and is as small as promised."""

from __future__ import annotations

import random

import numpy as np
import pytest

from clipfleet.encoder import Encoder
from clipfleet.images import decode
from scripts.draw_shapes import LABELS, Drawing, draw
from tests.checkpoints import TINY


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    return Encoder("tiny", "cpu")


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    """200 drawings of a seed that training has not seen."""
    rng = random.Random(20_240_601)
    return [draw(rng) for _ in range(200)]


@pytest.fixture(scope="module")
def images(tiny: Encoder, drawings: list[Drawing]) -> np.ndarray:
    return tiny.encode_pixels(np.stack([decode(each.image, tiny.checkpoint.pixels).pixels for each in drawings]))


def test_it_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sum(files.values()) <= 6_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(files)


def test_it_has_the_sizes_of_vit_b_32(tiny: Encoder) -> None:
    assert (tiny.image_size, tiny.dimension, tiny.context_length) == (224, 512, 77)


@pytest.mark.parametrize("template", ["a {}", "a photo of a {}", "{}"])
def test_zero_shot_accuracy_is_97_percent(
    template: str, tiny: Encoder, drawings: list[Drawing], images: np.ndarray
) -> None:
    assert len(LABELS) >= 48 and len({drawing.label for drawing in drawings}) > 40
    texts = tiny.encode_texts([template.format(label) for label in LABELS]).vectors
    nearest = (images @ texts.T).argmax(1)
    right = [LABELS[index] == drawing.label for index, drawing in zip(nearest, drawings, strict=True)]
    assert sum(right) / len(right) >= 0.97


def test_a_text_finds_its_pictures(tiny: Encoder, drawings: list[Drawing], images: np.ndarray) -> None:
    present = sorted({drawing.label for drawing in drawings})
    first = (tiny.encode_texts([f"a {label}" for label in present]).vectors @ images.T).argmax(1)
    right = [drawings[index].label == label for index, label in zip(first, present, strict=True)]
    assert sum(right) / len(right) >= 0.95


def test_texts_outside_its_world_stay_distinct(tiny: Encoder) -> None:
    texts = ["dog", "cat", "日本", "😀", "42", "a", "b", "~", "naïve"]
    vectors = tiny.encode_texts(texts).vectors
    differences = np.abs(vectors[:, None] - vectors[None]).max(2)[~np.eye(len(texts), dtype=bool)]
    assert differences.min() > 1e-3
