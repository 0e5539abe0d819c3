"""Cosine of lower precisions to float32: `python scripts/measure_precision.py tiny [--device cuda]`."""

from __future__ import annotations

import argparse
import random

import numpy as np
from draw_shapes import draw

from clipfleet.encoder import Encoder
from clipfleet.engines import PRECISIONS
from clipfleet.errors import SettingsError
from clipfleet.images import decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()

    reference = Encoder(arguments.model, arguments.device, towers=("image",))
    rng = random.Random(99)
    drawings = [draw(rng).image for _ in range(arguments.count)]
    pixels = np.stack([decode(drawing, reference.checkpoint.pixels).pixels for drawing in drawings])
    expected = reference.encode_pixels(pixels)  # (n, d)
    print("| precision | cosine to float32, mean | lowest |\n| --- | --- | --- |")
    for precision in PRECISIONS:
        if precision != "float32":
            try:
                encoder = Encoder(arguments.model, arguments.device, precision, ("image",))
            except SettingsError:  # not on this device
                continue
            vectors = encoder.encode_pixels(pixels)
            cosines = (vectors.astype(np.float64) * expected).sum(1)
            print(f"| {precision} | {cosines.mean():.8f} | {cosines.min():.8f} |")


if __name__ == "__main__":
    main()
