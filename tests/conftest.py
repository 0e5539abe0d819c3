"""What tests of the library share: drawn pictures and small checkpoints with random weights."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger
from PIL import Image

from scripts.draw_shapes import draw
from tests.checkpoints import make_clip, make_siglip
from tests.library import Library
from tests.pictures import encode

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted checkpoints of the tests, and of what they start, stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Twelve drawn pictures of different sizes."""
    rng = random.Random(2024)
    return [draw(rng).image for _ in range(12)]


@pytest.fixture(scope="session")
def picture_files(pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The drawn pictures as PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{number:02d}.png" for number in range(len(pictures))]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    return files


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random checkpoints: every supported kind, none of tiny's dimension or image size."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "clip": make_clip(folder / "clip"),
        "clip-int-sizes": make_clip(folder / "clip-int-sizes", image_size=96, dimension=20, style="int sizes"),
        "clip-nested": make_clip(folder / "clip-nested", image_size=80, dimension=36, style="nested"),
        "siglip": make_siglip(folder / "siglip"),
        "siglip2": make_siglip(folder / "siglip2", tokenizer="gemma", image_size=64, patch_size=16, style="nested"),
    }


@pytest.fixture(scope="session")
def random_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as wide as ViT-B/32 and of three layers a tower, with random weights: large enough that a forward pass is
    what takes the time."""
    folder = tmp_path_factory.mktemp("random") / "random-clip"
    command = [sys.executable, SCRIPTS / "make_random_clip.py", folder, "--seed", "3", "--layers", "3"]
    subprocess.run(command, check=True, timeout=300)
    return folder


@pytest.fixture
def log() -> Iterator[list[tuple[str, str]]]:
    """What loguru records during the test: (level, message), DEBUG and up."""
    records: list[tuple[str, str]] = []
    sink = logger.add(
        lambda message: records.append((message.record["level"].name, message.record["message"])), level="DEBUG"
    )
    yield records
    logger.remove(sink)


@pytest.fixture(scope="session")
def library() -> Library:
    return Library()


@pytest.fixture(scope="session")
def files(pictures: list[Image.Image]) -> list[bytes]:
    """The drawn pictures as PNG bytes."""
    return [encode(picture, "PNG") for picture in pictures]
