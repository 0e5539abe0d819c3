"""Write golden vectors of the embedded checkpoint: `python scripts/make_golden.py tests/data/golden`.

OUT gets pictures (PNG) and golden.npz with their vectors and those of TEXTS, computed by transformers alone:
float32, on the CPU, one item at a time, with the checkpoint's own PIL processor. Nothing here imports clipfleet,
so a mistake of ours cannot become the expected value. Run it again only when the checkpoint changes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw_shapes import draw
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

TINY = Path(__file__).parent.parent / "clipfleet" / "checkpoints" / "tiny"
TEXTS = [
    "a red circle",
    "a photo of a blue star on a yellow background",
    "GREEN Square",
    "a white ring, a black cross; and 7 more",
    "etwas ganz anderes: größer, 日本語, 😀",
    "",
    "word " * 200,
]


def make_pictures() -> dict[str, Image.Image]:
    """Pictures by name: drawings, portrait and landscape, transparency, palette, grey, noise, a strip."""
    rng = random.Random(77)
    noise = np.random.default_rng(77).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    clear = draw(rng, (200, 200)).image
    clear.putalpha(Image.linear_gradient("L").resize((200, 200)))
    return {
        "square": draw(rng, (224, 224)).image,
        "landscape": draw(rng, (400, 180)).image,
        "portrait": draw(rng, (170, 390)).image,
        "transparent": clear,
        "palette": draw(rng, (260, 240)).image.quantize(16),
        "grey": draw(rng, (230, 250)).image.convert("L"),
        "noise": Image.fromarray(noise),
        "strip": Image.linear_gradient("L").resize((900, 6)).convert("RGB"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out

    out.mkdir(parents=True, exist_ok=True)
    model: Any = CLIPModel.from_pretrained(TINY).eval()  # its methods' types allow for tuples that it never returns
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(TINY), CLIPTokenizer.from_pretrained(TINY)
    vectors = {}
    with torch.inference_mode():
        for name, picture in make_pictures().items():
            picture.save(out / f"{name}.png", optimize=True)
            pixels = processor(Image.open(out / f"{name}.png"), return_tensors="pt")
            vectors[name] = model.get_image_features(**pixels).pooler_output[0]  # (512,), projected
        for number, text in enumerate(TEXTS):
            tokens = tokenizer([text], truncation=True, max_length=77, return_tensors="pt")
            vectors[f"text {number}"] = model.get_text_features(**tokens).pooler_output[0]
    unit = {name: (vector / vector.norm()).numpy() for name, vector in vectors.items()}
    np.savez_compressed(out / "golden.npz", texts=np.array(TEXTS), **unit)


if __name__ == "__main__":
    main()
