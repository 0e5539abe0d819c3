"""Draw labelled pictures of coloured shapes: `python scripts/draw_shapes.py OUT --seed 7 --count 200`.

OUT gets `00000.png`, … and `labels.csv` (file, label, caption). The same drawings train the embedded
checkpoint, so labels are its whole world: "COLOUR SHAPE" for 8 colours and 6 shapes.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 214),
    "yellow": (245, 220, 50),
    "orange": (250, 140, 20),
    "purple": (140, 50, 180),
    "black": (18, 18, 18),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
LABELS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


class Drawing(NamedTuple):
    """One picture and what it shows."""

    image: Image.Image  # RGB
    label: str  # "red circle"
    caption: str  # "a red circle on a blue background"


def _jitter(rng: random.Random, colour: tuple[int, int, int], amount: int) -> tuple[int, ...]:
    return tuple(min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour)


def _polygon(centre: tuple[float, float], points: list[tuple[float, float]], turn: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(turn), math.sin(turn)
    return [(centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos) for x, y in points]


def _outline(shape: str, radius: float) -> list[tuple[float, float]]:
    if shape == "square":
        half = radius * 0.86
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "triangle":
        return [(radius * math.sin(a), -radius * math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    if shape == "star":
        radii = (radius, radius * 0.42)
        return [
            (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)
        ]
    arm, thick = radius, radius * 0.32  # cross
    return [
        (-thick, -arm), (thick, -arm), (thick, -thick), (arm, -thick), (arm, thick), (thick, thick),
        (thick, arm), (-thick, arm), (-thick, thick), (-arm, thick), (-arm, -thick), (-thick, -thick),
    ]  # fmt: skip


def draw(rng: random.Random, size: tuple[int, int] | None = None) -> Drawing:
    """Draw one picture; everything random comes from `rng`. `size` is (width, height), 160..480 px if not given."""
    colour = rng.choice(list(COLOURS))
    shape = rng.choice(SHAPES)
    ground = rng.choice([name for name in COLOURS if name != colour])
    width, height = size or (rng.randint(160, 480), rng.randint(160, 480))

    image = Image.new("RGB", (width, height), _jitter(rng, COLOURS[ground], 14))
    pen = ImageDraw.Draw(image)
    fill = _jitter(rng, COLOURS[colour], 14)
    side = min(width, height)
    radius = side * rng.uniform(0.22, 0.40)
    slack = side / 2 - radius
    # Checkpoints look at the central square, so the shape stays inside it.
    centre = (width / 2 + rng.uniform(-slack, slack), height / 2 + rng.uniform(-slack, slack))
    box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(3, round(radius * 0.30)))
    else:
        pen.polygon(_polygon(centre, _outline(shape, radius), rng.uniform(-0.35, 0.35)), fill=fill)
    return Drawing(image, f"{colour} {shape}", f"a {colour} {shape} on a {ground} background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=48)
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "labels.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(("file", "label", "caption"))
        for number in range(arguments.count):
            drawing = draw(rng)
            name = f"{number:05d}.png"
            drawing.image.save(arguments.out / name)
            rows.writerow((name, drawing.label, drawing.caption))


if __name__ == "__main__":
    main()
