"""What faster settings cost: cosines to float32 with whole JPEGs.

    python scripts/measure_precision.py tiny [--device cuda] [--jpegs FOLDER]

Precisions are measured on drawings, reduced_jpeg on the JPEG files in FOLDER (such as `python -m benchmarks.data` makes).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from draw_shapes import draw

from clipfleet.encoder import Encoder
from clipfleet.engines import PRECISIONS
from clipfleet.errors import SettingsError
from clipfleet.image_files import DEFAULT_LIMITS, ImageLimits
from clipfleet.images import decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--jpegs", type=Path)
    arguments = parser.parse_args()

    reference = Encoder(arguments.model, arguments.device, towers=("image",))
    spec = reference.checkpoint.pixels
    rng = random.Random(99)
    drawings = np.stack([decode(draw(rng).image, spec).pixels for _ in range(arguments.count)])
    expected = reference.encode_pixels(drawings)  # (n, d)
    print("| setting | cosine to float32, mean | lowest |\n| --- | --- | --- |")
    for precision in PRECISIONS:
        if precision != "float32":
            try:
                encoder = Encoder(arguments.model, arguments.device, precision, ("image",))
            except SettingsError:  # not on this device
                continue
            _print(precision, encoder.encode_pixels(drawings), expected)
    if arguments.jpegs:
        files = sorted(arguments.jpegs.glob("*.jpg"))[: arguments.count]
        whole, reduced = (
            reference.encode_pixels(np.stack([decode(file, spec, limits).pixels for file in files]))
            for limits in (DEFAULT_LIMITS, ImageLimits(reduced_jpeg=True))
        )
        _print(f"reduced_jpeg ({len(files)} files)", reduced, whole)


def _print(setting: str, vectors: np.ndarray, expected: np.ndarray) -> None:
    cosines = (vectors.astype(np.float64) * expected).sum(1)
    print(f"| {setting} | {cosines.mean():.8f} | {cosines.min():.8f} |")


if __name__ == "__main__":
    main()
