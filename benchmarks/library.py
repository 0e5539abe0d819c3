"""Files to vectors in process: CLIPEmbedder against the loop that users write, over the same 384 photographs."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import data
from benchmarks.environments import PLAIN, environment
from benchmarks.programs import Program, alternate, ratio, running
from benchmarks.report import Row

FILES = 384
HERE = Path(__file__).parent


def measure(repetitions: int) -> list[Row]:
    paths, checkpoint = data.files(data.photographs(FILES)), data.checkpoint()
    ours = [
        Program(f"library, {precision}", sys.executable, "-m", "benchmarks.library_loop", checkpoint, precision, *paths)
        for precision in ("float32", "int8")
    ]
    plain = Program(
        "plain loop", environment("plain", PLAIN) / "python", HERE / "peers" / "plain_loop.py", checkpoint, *paths
    )
    with running(*ours, plain):
        _agree(*ours, plain)
        exact, quick, theirs = alternate([*ours, plain], FILES, repetitions)
    against = "plain loop (transformers, batch 32, 2 threads)"
    return [
        Row("library, files to vectors, float32", "images/s", exact, theirs, against, ratio(exact, theirs), "1.4"),
        Row("library, files to vectors, int8", "images/s", quick, theirs, against, ratio(quick, theirs), "3.5"),
    ]


def _agree(exact: Program, quick: Program, plain: Program) -> None:
    """A rate counts only for the right vectors."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.npy") for number in range(3)]
        for program, file in zip((exact, quick, plain), files, strict=True):
            program.run(64, file)
        ours, int8, theirs = (np.load(file) for file in files)
    difference, cosines = np.abs(ours - theirs).max(), (int8 * theirs).sum(1)
    print(f"float32 differs from the plain loop by {difference:.1e}; int8's cosine to it: mean {cosines.mean():.5f}, "
          f"lowest {cosines.min():.5f}")  # fmt: skip
    assert difference <= 1e-5 and cosines.mean() >= 0.999
