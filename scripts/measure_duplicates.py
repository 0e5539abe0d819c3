"""What `clipfleet duplicates` takes for many rows: seconds, and the most memory.

    python scripts/measure_duplicates.py [--rows 100000]

The rows are random unit vectors of 512 numbers, of which each tenth is nearly the one before it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.destination import claim
from jobs.duplicates import find
from jobs.parts import Origin, write

A_FILE, DIMENSION, TWINS = 5_000, 512, 10
ORIGIN = Origin("of-random-vectors", "none", None, "float32", "none")


def make(dest: Path, rows: int) -> None:
    """A DEST of random rows, file by file."""
    rng = np.random.default_rng(3)
    with claim(str(dest)) as claimed:
        for first in range(0, rows, A_FILE):
            count = min(A_FILE, rows - first)
            vectors = rng.normal(size=(count, DIMENSION))
            vectors[1::TWINS] = vectors[0 : len(vectors[1::TWINS]) * TWINS : TWINS] + rng.normal(
                scale=0.1, size=vectors[1::TWINS].shape
            )
            names = [f"{first + number}.jpg" for number in range(count)]
            columns = {
                "id": names,
                "uri": names,
                "width": pa.array([1] * count, pa.int32()),
                "height": pa.array([1] * count, pa.int32()),
                "error": pa.array([None] * count, pa.string()),
                "size": pa.array([None] * count, pa.int64()),
                "modified": pa.array([None] * count, pa.timestamp("us", tz="UTC")),
            }
            unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            write(claimed, ORIGIN, "parquet", pa.table(columns), unit.astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dest = Path(folder)
        make(dest, arguments.rows)
        began = time.monotonic()
        groups = find(dest, 0.97)
        took = time.monotonic() - began
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{arguments.rows:,} rows: {len(groups):,} groups in {took:.0f} s, at most {most:.0f} MB")


if __name__ == "__main__":
    main()
