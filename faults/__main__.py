"""Cause faults and print one row a promise.

    python -m faults chaos | upgrades | nodes | job | overload | fuzz | schema | soak
                     [--seconds S] [--images N] [--files N] [--seed K] [--leak-bytes N]

Status 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable

from faults import chaos, deploys, fuzz, job, nodes, overload, schema, soak, upgrades, uploads
from faults.report import Row, table

KINDS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "chaos": lambda given: [*chaos.measure(given.seconds), *uploads.measure(given.seconds)],
    "upgrades": lambda _: [*upgrades.measure(), *deploys.measure()],
    "nodes": lambda _: nodes.dying_node(),
    "job": lambda given: job.measure(given.images),
    "overload": lambda given: overload.measure(given.seconds),
    "fuzz": lambda given: fuzz.measure(given.files, given.files // 4, given.seed),
    "schema": lambda given: schema.measure(given.seed),
    "soak": lambda given: soak.measure(given.seconds, given.seed, given.leak_bytes),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=60, help="of each fault, or of the soak (default 60)")
    parser.add_argument("--images", type=int, default=20_000, help="of the job that is killed (default 20,000)")
    parser.add_argument("--files", type=int, default=20_000, help="through the decoder; a quarter as many over HTTP")
    parser.add_argument("--leak-bytes", type=int, default=0, help="of each JPEG in the soak, which has to be found")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)
    rows = KINDS[arguments.kind](arguments)
    print(f"\n{table(rows)}")
    sys.exit(0 if all(row.kept for row in rows) else 1)


if __name__ == "__main__":
    main()
