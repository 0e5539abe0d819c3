"""Engine torch on an NVIDIA GPU. Skipped where torch finds none; tests/deployments and tests/jobs have a test_gpu.py too."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from loguru import logger
from PIL import Image

from clipfleet.encoder import Encoder
from tests.checkpoints import TINY
from tests.reference import Reference
from tests.test_encoder import KINDS, TEXTS, pixels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
LOWEST_COSINE = {"float16": 0.9999, "bfloat16": 0.999}


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {"tiny": TINY, **checkpoints}


@pytest.mark.parametrize("kind", KINDS)
def test_float32_equals_the_reference_on_a_cpu(
    kind: str, folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    """TF32 would be wrong by 1e-3."""
    encoder, reference = Encoder(str(folders[kind]), "cuda"), Reference(folders[kind])
    assert encoder.engine == "torch" and encoder.device == "cuda"
    assert np.abs(encoder.encode_pixels(pixels(encoder, pictures)) - reference.images(pictures)).max() <= 1e-5
    assert np.abs(encoder.encode_texts(TEXTS).vectors - reference.texts(TEXTS)).max() <= 1e-5


@pytest.mark.parametrize("precision", LOWEST_COSINE)
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precisions_stay_near_float32(
    kind: str, precision: str, folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    exact, encoder = Encoder(str(folders[kind]), "cpu", engine="torch"), Encoder(str(folders[kind]), "cuda", precision)
    drawn = pixels(encoder, pictures)
    for found, expected in (
        (encoder.encode_pixels(drawn), exact.encode_pixels(drawn)),
        (encoder.encode_texts(TEXTS).vectors, exact.encode_texts(TEXTS).vectors),
    ):
        assert found.dtype == np.float32
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() <= 1e-5
        assert (found * expected).sum(1).min() >= LOWEST_COSINE[precision]


def test_threads_share_an_encoder(pictures: list[Image.Image]) -> None:
    encoder = Encoder("tiny", "cuda")
    drawn = pixels(encoder, pictures)
    expected = encoder.encode_pixels(drawn)
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda number: encoder.encode_pixels(drawn[number : number + 1])[0], [*range(12)] * 20))
    assert np.abs(np.stack(rows) - np.tile(expected, (20, 1))).max() <= 1e-5


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    heard: list[str] = []
    sink = logger.add(lambda message: heard.append(message.record["message"]), level="WARNING")
    yield heard
    logger.remove(sink)


def test_a_batch_that_the_memory_cannot_hold_is_halved(pictures: list[Image.Image], warnings: list[str]) -> None:
    encoder = Encoder("tiny", "cuda")
    drawn = np.tile(pixels(encoder, pictures), (512, 1, 1, 1))  # 6,144 images
    quarter = len(drawn) // 4
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    encoder.encode_pixels(drawn[:quarter])
    enough = torch.cuda.max_memory_reserved()
    expected = encoder.encode_pixels(drawn)
    assert warnings == [] and torch.cuda.max_memory_reserved() > 2 * enough
    torch.cuda.empty_cache()
    # What a GPU has that others have filled up to here.
    torch.cuda.set_per_process_memory_fraction(1.25 * enough / torch.cuda.mem_get_info()[1])
    try:
        found = encoder.encode_pixels(drawn)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert warnings and all("cuda ran out of memory at batch size" in line for line in warnings)
    assert np.abs(found - expected).max() <= 1e-5


def test_a_closed_encoder_gives_its_memory_back() -> None:
    left = []
    for _ in range(2):  # what torch itself keeps, it takes the first time
        encoder = Encoder("tiny", "cuda")
        encoder.encode_texts(TEXTS)
        held = torch.cuda.memory_reserved()
        encoder.close()
        left.append(torch.cuda.memory_reserved())
        assert left[-1] < held
    assert left[0] == left[1]
