"""Run benchmarks and print one table: `python -m benchmarks [library service ...] [--repetitions N] [--out FOLDER]`.

Each workload runs both sides in one go, in turns, with the same weights and pictures; a row has the median of the ratios, their
spread, and the target. The table is written to FOLDER/table.md and FOLDER/table.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import gpu, job, library, parts, service, start, transport
from benchmarks.data import CACHE
from benchmarks.report import Row, as_json, machine, table

WORKLOADS: dict[str, Callable[[int, list[str]], list[Row]]] = {
    "library": library.measure,
    "transport": transport.measure,
    "start": start.measure,
    "service": service.measure,
    "job": job.measure,
    "parts": parts.measure,
    "gpu": gpu.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=CACHE / "results")
    arguments = parser.parse_args()
    unknown = set(arguments.workloads) - set(WORKLOADS)
    if unknown:
        parser.error(f"there is no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")

    rows: list[Row] = []
    notes: list[str] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.workloads or WORKLOADS:
        print(f"--- {name}", flush=True)
        began = time.monotonic()
        rows += WORKLOADS[name](arguments.repetitions, notes)
        print(f"{name} took {time.monotonic() - began:.0f} s", flush=True)
        # After each, so that what was measured is not lost with what fails later.
        listed = "\n".join(f"- {note}" for note in notes)
        (arguments.out / "table.md").write_text(f"{machine()}\n\n{table(rows)}\n\n{listed}\n")
        (arguments.out / "table.json").write_text(json.dumps(as_json(rows, notes), indent=2))
    print(f"\n{(arguments.out / 'table.md').read_text()}")


if __name__ == "__main__":
    main()
