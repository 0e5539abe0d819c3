"""Cause faults and print one row a promise.

    python -m faults chaos | job | overload | fuzz | soak [--seconds S] [--images N] [--files N] [--seed K]

Status 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import random
import sys

from faults import chaos, fuzz, job, overload, soak
from faults.report import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("chaos", "job", "overload", "fuzz", "soak"))
    parser.add_argument("--seconds", type=float, default=60, help="of each fault, or of the soak (default 60)")
    parser.add_argument("--images", type=int, default=20_000, help="of the job that is killed (default 20,000)")
    parser.add_argument("--files", type=int, default=20_000, help="through the decoder; a quarter as many over HTTP")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)
    if arguments.kind == "chaos":
        rows = chaos.measure(arguments.seconds)
    elif arguments.kind == "job":
        rows = job.measure(arguments.images)
    elif arguments.kind == "overload":
        rows = overload.measure(arguments.seconds)
    elif arguments.kind == "soak":
        rows = soak.measure(arguments.seconds, arguments.seed)
    else:
        rows = fuzz.measure(arguments.files, arguments.files // 4, arguments.seed)
    print(f"\n{table(rows)}")
    sys.exit(0 if all(row.kept for row in rows) else 1)


if __name__ == "__main__":
    main()
