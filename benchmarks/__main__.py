"""Run benchmarks and print one table: `python -m benchmarks [library service ...] [--repetitions N] [--out FOLDER]`.

Each workload runs both sides in one go, in turns, with the same weights and pictures; a row has the median of the ratios, their
spread, and the target. The table is written to FOLDER/table.md and FOLDER/table.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks import library, service
from benchmarks.data import CACHE
from benchmarks.report import Row, machine, table

WORKLOADS: dict[str, Callable[[int], list[Row]]] = {"library": library.measure, "service": service.measure}


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
    for name in arguments.workloads or WORKLOADS:
        print(f"--- {name}", flush=True)
        rows += WORKLOADS[name](arguments.repetitions)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(f"{machine()}\n\n{table(rows)}\n")
    (arguments.out / "table.json").write_text(json.dumps([asdict(row) for row in rows], indent=2))
    print(f"\n{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
