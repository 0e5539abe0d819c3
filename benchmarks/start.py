"""From the command to ready: `clipfleet serve` with tiny, whose converted towers are kept from an earlier start."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.programs import Spread
from benchmarks.report import Row
from benchmarks.services import clipfleet


def measure(repetitions: int, notes: list[str]) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        service = clipfleet("tiny", Path(folder))
        for _ in range(repetitions + 1):
            with service.running():
                pass
    notes.append(f"The first start of tiny, with whatever had to be converted: {service.starts[0]:.1f} s")
    seconds = Spread.of(service.starts[1:])
    return [Row("clipfleet serve, tiny, command to ready", seconds, "s", "", None, seconds, 15, at_most=True)]
