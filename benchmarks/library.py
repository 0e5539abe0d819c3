"""Files to vectors in process: CLIPEmbedder against the loop that users write, over the same photographs."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import data
from benchmarks.environments import PLAIN, environment
from benchmarks.programs import Program, alternate, ratio, running
from benchmarks.report import Row

HERE = Path(__file__).parent
# precision, how JPEGs are decoded, target
SETTINGS = (("float32", "whole", 1.4), ("int8", "whole", 3.5), ("int8", "reduced", None))


def measure(repetitions: int, notes: list[str]) -> list[Row]:
    paths, checkpoint = data.files(data.photographs(data.LIBRARY_FILES)), data.checkpoint()
    ours = [
        Program(
            f"{precision} {jpeg}", sys.executable, "-m", "benchmarks.library_loop", checkpoint, precision, jpeg, *paths
        )
        for precision, jpeg, _ in SETTINGS
    ]
    plain = Program(
        "plain loop", environment("plain", PLAIN) / "python", HERE / "peers" / "plain_loop.py", checkpoint, *paths
    )
    with running(*ours, plain):
        notes.append(_agreement(ours, plain))
        *rates, theirs = alternate([*ours, plain], len(paths), repetitions)
        for program in (*ours, plain):
            notes.append(f"Peak memory of the library benchmark, {program.name}: {program.memory() / 2**20:.0f} MB")
    against = "plain loop (transformers, batch 32, 2 threads)"
    return [
        Row(
            f"library, files to vectors, {precision}{', reduced_jpeg' if jpeg == 'reduced' else ''}",
            rate, "images/s", against, theirs, ratio(rate, theirs), target,
        )
        for (precision, jpeg, target), rate in zip(SETTINGS, rates, strict=True)
    ]  # fmt: skip


def _agreement(ours: list[Program], plain: Program) -> str:
    """A rate counts only for the right vectors."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, program in enumerate((*ours, plain)):
            program.run(64, Path(folder, f"{number}.npy"))
            found.append(np.load(Path(folder, f"{number}.npy")))
    exact, quick, reduced, theirs = found
    difference = np.abs(exact - theirs).max()
    cosines = [(vectors * theirs).sum(1) for vectors in (quick, reduced)]
    assert difference <= 1e-5 and min(cosine.mean() for cosine in cosines) >= 0.999
    return (
        f"float32 differs from the plain loop by {difference:.1e}; cosine of int8 to it: mean {cosines[0].mean():.5f}, "
        f"lowest {cosines[0].min():.5f}; of int8 with reduced_jpeg: mean {cosines[1].mean():.5f}, lowest {cosines[1].min():.5f}"
    )
