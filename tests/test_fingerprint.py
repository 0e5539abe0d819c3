"""The fingerprint changes with everything that vectors depend on, and with nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from clipfleet.checkpoint import find_checkpoint
from clipfleet.fingerprint import fingerprint
from tests.checkpoints import TINY, copy_tiny, edit_json, make_clip


def of(folder: Path, **options: Any) -> str:
    return fingerprint(find_checkpoint(str(folder)), **options)


def test_it_is_16_hexadecimal_digits_and_the_same_each_time() -> None:
    first = fingerprint(find_checkpoint("tiny"))
    assert re.fullmatch("[0-9a-f]{16}", first) and first == fingerprint(find_checkpoint("tiny"))


def test_where_the_checkpoint_lies_does_not_count(tmp_path: Path) -> None:
    assert of(copy_tiny(tmp_path / "elsewhere")) == fingerprint(find_checkpoint("tiny")) == of(TINY)


def test_files_and_settings_that_only_describe_do_not_count(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "copy")
    (folder / "README.md").write_text("new words")
    edit_json(folder / "config.json", transformers_version="6.0", architectures=["X"], dtype=None, _name_or_path="y")
    assert of(folder) == of(TINY)


def test_formatting_of_json_does_not_count(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "copy")
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()), indent=7, sort_keys=True))
    assert of(folder) == of(TINY)


def one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def one_merge(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content))


CHANGES = {
    "weights": one_weight,
    "tokenizer": one_merge,
    "tokenizer settings": lambda folder: edit_json(folder / "tokenizer_config.json", model_max_length=16),
    "a tokenizer file more": lambda folder: (folder / "added_tokens.json").write_text("{}"),
    "mean": lambda folder: edit_json(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
    "resample": lambda folder: edit_json(folder / "preprocessor_config.json", resample=2),
    "activation": lambda folder: edit_json(folder / "config.json", hidden_act="gelu"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_vectors_counts(tmp_path: Path, change: str) -> None:
    folder = copy_tiny(tmp_path / "changed")
    CHANGES[change](folder)
    assert of(folder) != of(TINY)


def test_orientation_counts() -> None:
    assert of(TINY, exif_orientation=False) != of(TINY) == of(TINY, exif_orientation=True)


def test_our_preprocessing_version_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(TINY)
    monkeypatch.setattr("clipfleet.fingerprint.PREPROCESSING_VERSION", 10**6)
    assert of(TINY) != before


def test_other_seeds_differ(tmp_path: Path) -> None:
    assert of(make_clip(tmp_path / "one", seed=1)) != of(make_clip(tmp_path / "two", seed=2))
