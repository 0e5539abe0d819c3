"""What the benchmarks print."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.programs import Spread


@dataclass(frozen=True)
class Row:
    """One comparison. `value` is what the target is about: a ratio of both sides, or our figure alone.

    The target is the lowest good value, or the highest where `at_most`; None where there is none.
    """

    work: str
    ours: Spread
    unit: str
    against: str
    theirs: Spread | None
    value: Spread
    target: float | None = None
    at_most: bool = False

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.value.median <= self.target if self.at_most else self.value.median >= self.target

    def line(self) -> str:
        target = "–" if self.target is None else f"{'at most' if self.at_most else 'at least'} {self.target:g}"
        verdict = {True: "reached", False: "**missed**", None: ""}[self.reached]
        theirs = f"{self.theirs} {self.unit}" if self.theirs else ""
        return f"| {self.work} | {self.ours} {self.unit} | {self.against} | {theirs} | {self.value} | {target} | {verdict} |"


def table(rows: Sequence[Row]) -> str:
    lines = ["| work | clipfleet | against | | value | target | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    return "\n".join([*lines, *(row.line() for row in rows)])


def as_json(rows: Sequence[Row], notes: Sequence[str]) -> dict[str, Any]:
    listed = [{**asdict(row), "median": row.value.median, "reached": row.reached} for row in rows]
    return {"machine": machine(), "rows": listed, "notes": list(notes)}


def machine() -> str:
    """The machine and the versions that matter, in words."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.machine()
    packages = ", ".join(map(_with_version, ("ray", "torch", "openvino", "transformers", "pillow")))
    return f"{os.cpu_count()} cores ({name}), Python {platform.python_version()}, {packages}. Median (lowest–highest)."


def _with_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # openvino, beside a GPU
        return f"no {package}"
