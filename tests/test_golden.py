"""The embedded checkpoint gives the vectors that transformers alone gave (scripts/make_golden.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from clipfleet.encoder import Encoder
from clipfleet.images import decode
from tests.checkpoints import make_clip

GOLDEN = Path(__file__).parent / "data" / "golden"
PICTURES = ["square", "landscape", "portrait", "transparent", "palette", "grey", "noise", "strip"]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    return Encoder("tiny", "cpu")


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_gives_its_golden_vector(name: str, golden: dict[str, np.ndarray], tiny: Encoder) -> None:
    pixels = decode(GOLDEN / f"{name}.png", tiny.checkpoint.pixels).pixels
    assert np.abs(tiny.encode_pixels(pixels[None])[0] - golden[name]).max() <= 1e-5


def test_texts_give_their_golden_vectors(golden: dict[str, np.ndarray], tiny: Encoder) -> None:
    texts = golden["texts"].tolist()
    expected = np.stack([golden[f"text {number}"] for number in range(len(texts))])
    assert np.abs(tiny.encode_texts(texts).vectors - expected).max() <= 1e-5


def test_golden_vectors_differ_from_each_other(golden: dict[str, np.ndarray]) -> None:
    vectors = np.stack([vector for name, vector in golden.items() if name != "texts"])
    assert vectors.shape == (len(PICTURES) + 7, 512) and {file.stem for file in GOLDEN.glob("*.png")} == set(PICTURES)
    differences = np.abs(vectors[:, None] - vectors[None]).max(2)[~np.eye(len(vectors), dtype=bool)]
    assert differences.min() > 1e-3


def test_texts_and_images_are_projected_exactly_once(tmp_path: Path) -> None:
    # Where the tower is as wide as its projection, as in ViT-B/32, a second projection has the right shape.
    folder = make_clip(tmp_path / "clip", dimension=32)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(str(folder), "cpu")
    spec = encoder.checkpoint.pixels
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    with torch.inference_mode():
        hidden = model.text_model(**tokenizer(["a red circle"], return_tensors="pt")).pooler_output
        once = model.text_projection(hidden)
        assert_single(encoder.encode_texts(["a red circle"]).vectors, hidden, once, model.text_projection(once))
        scaled = (torch.from_numpy(pixels) / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
        scaled = scaled.permute(0, 3, 1, 2)
        hidden = model.vision_model(pixel_values=scaled).pooler_output
        once = model.visual_projection(hidden)
        assert_single(encoder.encode_pixels(pixels), hidden, once, model.visual_projection(once))


def assert_single(ours: np.ndarray, none: torch.Tensor, once: torch.Tensor, twice: torch.Tensor) -> None:
    assert ours.shape == none.shape == once.shape == twice.shape
    distance = [np.abs(ours - (vectors / vectors.norm()).numpy()).max() for vectors in (none, once, twice)]
    assert distance[1] <= 1e-5 and distance[0] > 1e-2 and distance[2] > 1e-2
