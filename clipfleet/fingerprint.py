"""What makes two vectors comparable: one hash over everything that a float32 vector depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from clipfleet.checkpoint import Checkpoint, PixelSpec
from clipfleet.images import PREPROCESSING_VERSION

# Files that change tokens. Files that only describe the checkpoint (README, architectures) do not count.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
)


def fingerprint(checkpoint: Checkpoint, *, exif_orientation: bool = True) -> str:
    """Hash weights, tokenisation, processor settings and our preprocessing into 16 hexadecimal digits.

    Precision, engine and device are not part of it: they change vectors by less than what a search notices,
    and are recorded beside it. Reading the weights takes about a second a gigabyte.
    """
    digest = hashlib.sha256()
    recipe = _preprocessing(checkpoint.pixels, exif_orientation)
    recipe["config"] = _model_settings(checkpoint.folder / "config.json")
    digest.update(json.dumps(recipe, sort_keys=True).encode())
    for path in [*checkpoint.weight_files(), *_tokenizer_files(checkpoint.folder)]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def preprocessing_of(pixels: PixelSpec, *, exif_orientation: bool) -> str:
    """Hash the part of it that a decoder knows, which has no weights, into 16 hexadecimal digits."""
    recipe = _preprocessing(pixels, exif_orientation)
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _preprocessing(pixels: PixelSpec, exif_orientation: bool) -> dict[str, object]:
    return {
        "preprocessing": PREPROCESSING_VERSION,
        "exif_orientation": exif_orientation,
        "pixels": asdict(pixels),
    }


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]


_BOOKKEEPING = ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")


def _model_settings(config: Path) -> dict[str, object]:
    settings = json.loads(config.read_text(encoding="utf-8"))
    return {key: value for key, value in settings.items() if key not in _BOOKKEEPING}
