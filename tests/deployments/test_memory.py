"""What a replica's C library keeps of freed blocks."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

# Freeing the first, larger array makes glibc take arrays below its size from the heap, where the small blocks between them
# keep the heap from shrinking. Prints the MiB still held after all arrays are freed.
_CHURN = """
import numpy as np
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

before = resident()
large = np.ones(2**21)
del large
arrays, between = [], []
for _ in range(200):
    arrays.append(np.ones(2**16))
    between.append(bytearray(40_000))
del arrays
"""


def _held(first: str) -> float:
    root = Path(__file__).parents[2]
    code = f"{first}\n{_CHURN}\nprint(resident() - before)"
    return float(subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this limit")
def test_large_blocks_are_returned_at_once() -> None:
    assert _held("") > 80, "this test shows nothing: the C library already returns them"
    assert _held("from deployments import memory; memory.return_large_blocks()") < 30
