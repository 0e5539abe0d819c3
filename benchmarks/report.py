"""What the benchmarks print."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.programs import Spread


@dataclass(frozen=True)
class Row:
    """One comparison: figures of both sides in `unit`, and the ratio with its target."""

    work: str
    unit: str
    ours: Spread
    theirs: Spread
    against: str
    ratio: Spread
    target: str


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| work | clipfleet | against | | ratio | target |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row.work} | {row.ours} {row.unit} | {row.against} | {row.theirs} {row.unit} | {row.ratio} | {row.target} |"
            for row in rows
        ),
    ]
    return "\n".join(lines)


def machine() -> str:
    """The machine and the versions that matter, in words."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.machine()
    packages = ", ".join(
        f"{package} {version(package)}" for package in ("ray", "torch", "openvino", "transformers", "pillow")
    )
    return f"{os.cpu_count()} cores ({name}), Python {platform.python_version()}, {packages}. Median (lowest–highest)."
