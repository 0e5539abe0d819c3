"""What the benchmarks work on: photograph-like JPEGs and a full-size ViT-B/32, made once and kept.

`photographs` cuts and enlarges the colour photographs that scikit-image and scikit-learn ship and adds grain, so that the files
have the bytes a pixel of a camera's (1 to 3 bits) and take a decoder as long.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "bench"
SHAPES = ((4, 3), (3, 2), (1, 1), (3, 4), (2, 3), (16, 9))  # as cameras and shops have them
WIDTHS = (640, 4000)  # of the longer edge, in pixels; the logarithm is uniform
LIBRARY_FILES = 384
GRAIN = 5.0  # standard deviation of the noise, of 255


def _sources() -> list[Image.Image]:
    from skimage import data
    from sklearn.datasets import load_sample_image

    ours = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    return [
        Image.fromarray(array) for array in (*ours, load_sample_image("china.jpg"), load_sample_image("flower.jpg"))
    ]


def photograph(sources: list[Image.Image], rng: random.Random) -> Image.Image:
    """One picture: a cut of a source, enlarged, mirrored or not, with grain."""
    source = rng.choice(sources)
    across, down = rng.choice(SHAPES)
    scale = rng.uniform(0.5, 1.0) * min(source.width / across, source.height / down)
    width, height = across * scale, down * scale
    left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
    longer = math.exp(rng.uniform(*map(math.log, WIDTHS)))
    size = round(longer * across / max(across, down)), round(longer * down / max(across, down))
    picture = source.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, GRAIN, (size[1], size[0], 1))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))


def photographs(count: int, seed: int = 5) -> Path:
    """A folder of `count` JPEGs, 00000.jpg and on."""
    folder = CACHE / f"photographs-{count}-{seed}"
    if not (folder / "made.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rng, sources = random.Random(seed), _sources()
        total = pixels = 0
        for number in range(count):
            picture = photograph(sources, rng)
            file = folder / f"{number:05d}.jpg"
            picture.save(file, quality=rng.randint(80, 92))
            total, pixels = total + file.stat().st_size, pixels + picture.width * picture.height
        made = {"files": count, "bytes_per_file": total // count, "megapixels_per_file": round(pixels / count / 1e6, 2)}
        (folder / "made.json").write_text(json.dumps(made))
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jpg"))


def checkpoint() -> Path:
    """A ViT-B/32 of full size with random weights."""
    folder = CACHE / "random-vit-b-32"
    if not (folder / "preprocessor_config.json").exists():
        subprocess.run([sys.executable, ROOT / "scripts" / "make_random_clip.py", folder], check=True)
    return folder
