"""What one NVIDIA GPU does with pixels that are in memory: engine torch against transformers on the same weights.

Without a GPU there are no rows. Files to vectors are a matter of the cores that decode; `clipfleet plan` counts them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.programs import Spread, ratio
from benchmarks.report import Row
from clipfleet.encoder import Encoder
from clipfleet.engines import PRECISIONS

BATCHES = (1, 8, 32, 128, 256)
SECONDS = 1.0
TEXTS = [f"a photograph of number {number}, on a table beside a window" for number in range(256)]
AGAINST = "transformers, pixels scaled on the CPU before"


def measure(repetitions: int, notes: list[str]) -> list[Row]:
    import torch

    if not torch.cuda.is_available():
        notes.append("gpu: torch finds none, nothing was measured")
        return []
    notes.append(f"gpu: {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), 224, 224, 3), np.uint8)
    rows, exact = [], None
    for precision in (name for name in PRECISIONS if name != "int8"):
        encoder = Encoder(str(data.checkpoint()), "cuda", precision)
        theirs = _transformers(precision)
        vectors = encoder.encode_pixels(pixels)
        exact = vectors if exact is None else exact
        cosines = (vectors * theirs(_scaled(pixels, encoder))).sum(1), (vectors * exact).sum(1)
        notes.append(
            f"{precision}: lowest cosine to transformers' {cosines[0].min():.6f}, to float32 {cosines[1].min():.6f}"
        )
        for size in BATCHES:
            ours = partial(encoder.encode_pixels, pixels[:size])
            a, b = _in_turns((ours, partial(theirs, _scaled(pixels[:size], encoder))), size, repetitions)
            rows.append(Row(f"GPU, {precision}, batch {size}", a, "images/s", AGAINST, b, ratio(a, b)))
        (texts,) = _in_turns([partial(encoder.encode_texts, TEXTS)], len(TEXTS), repetitions)
        rows.append(Row(f"GPU, {precision}, {len(TEXTS)} texts", texts, "texts/s", "", None, texts))
        encoder.close()
    return rows


def _scaled(pixels: np.ndarray, encoder: Encoder) -> np.ndarray:
    """What a processor of transformers returns: float32 (n, 3, H, W)."""
    spec = encoder.checkpoint.pixels
    scaled = (pixels.astype(np.float32) * np.float32(spec.rescale) - np.float32(spec.mean)) / np.float32(spec.std)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _transformers(precision: str) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(data.checkpoint(), dtype=getattr(torch, precision)).eval().to("cuda")

    @torch.inference_mode()
    def run(scaled: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(scaled).to("cuda", model.dtype)
        vectors = model.get_image_features(pixel_values=inputs).pooler_output
        return (vectors / vectors.norm(dim=1, keepdim=True)).float().cpu().numpy()

    return run


def _in_turns(programs: Sequence[Callable[[], object]], items: int, repetitions: int) -> list[Spread]:
    """Items a second of each program."""
    found: list[list[float]] = [[] for _ in programs]
    for program in programs:
        program()
    for turn in range(repetitions):
        pairs = list(zip(programs, found, strict=True))
        for program, rates in reversed(pairs) if turn % 2 else pairs:
            started, count = time.perf_counter(), 0
            while time.perf_counter() - started < SECONDS:
                program()  # returns vectors in memory, so that the GPU has finished
                count += items
            rates.append(count / (time.perf_counter() - started))
    return [Spread.of(rates) for rates in found]
