"""The scripts that make pictures and checkpoints do what their first lines say."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from clipfleet.encoder import Encoder
from clipfleet.images import decode
from scripts.draw_shapes import LABELS
from scripts.make_random_clip import TINY, make_config

SCRIPTS = Path(__file__).parent.parent / "scripts"


def run(script: str, *arguments: object) -> str:
    """What it prints."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_drawing_writes_pictures_and_their_labels(tmp_path: Path) -> None:
    run("draw_shapes.py", tmp_path / "shapes", "--seed", 7, "--count", 5)
    with (tmp_path / "shapes" / "labels.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert list(rows[0]) == ["file", "label", "caption"] and len(rows) == 5
    for row in rows:
        assert row["label"] in LABELS and row["label"] in row["caption"]
        with Image.open(tmp_path / "shapes" / row["file"]) as picture:
            assert picture.mode == "RGB" and picture.format == "PNG"


def test_drawing_follows_its_seed(tmp_path: Path) -> None:
    for folder, seed in (("one", 3), ("again", 3), ("other", 4)):
        run("draw_shapes.py", tmp_path / folder, "--seed", seed, "--count", 3)
    one, again, other = ([file.read_bytes() for file in sorted((tmp_path / name).iterdir())]
                         for name in ("one", "again", "other"))  # fmt: skip
    assert one == again != other


def test_the_random_checkpoint_has_openais_numbers() -> None:
    made = make_config(CLIPTokenizer.from_pretrained(TINY))
    config = made.to_dict()
    text, vision = config["text_config"], config["vision_config"]
    layers = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    assert [text[name] for name in layers] == [512, 2048, 8, 12]
    assert [vision[name] for name in layers] == [768, 3072, 12, 12]
    assert (text["vocab_size"], text["max_position_embeddings"]) == (49408, 77)
    assert (vision["image_size"], vision["patch_size"], config["projection_dim"]) == (224, 32, 512)
    with torch.device("meta"):  # sizes alone
        assert sum(weight.numel() for weight in CLIPModel(made).parameters()) == 151_277_313


def test_the_random_checkpoint_tells_pictures_and_texts_apart(random_clip: Path, pictures: list[Image.Image]) -> None:
    encoder = Encoder(str(random_clip), "cpu")
    pixels = np.stack([decode(picture, encoder.checkpoint.pixels).pixels for picture in pictures])
    for vectors in (encoder.encode_pixels(pixels), encoder.encode_texts(list(LABELS[:12])).vectors):
        differences = np.abs(vectors[:, None] - vectors[None]).max(2)[~np.eye(12, dtype=bool)]
        assert vectors.shape == (12, 512) and differences.min() > 1e-3


def test_measuring_duplicates_finds_the_pairs_that_it_makes() -> None:
    assert run("measure_duplicates.py", "--rows", 300).startswith("300 rows: 30 groups in ")
