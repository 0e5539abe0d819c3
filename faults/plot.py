"""Draw what `python -m faults overload` measured: `python -m faults.plot build/overload.json docs/overload.svg`.

Needs matplotlib, which nothing else here does: `make plot` installs it.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main(source: str, target: str) -> None:
    mpl: Any = import_module("matplotlib")
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "clipfleet"  # the same figures give the same file
    plt: Any = import_module("matplotlib.pyplot")
    found = json.loads(Path(source).read_text())
    factors = [each["factor"] for each in found]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    above.plot(factors, [each["accepted_rate"] for each in found], "o-", label="answered 200")
    above.plot(factors, [each["refused_rate"] for each in found], "s--", label="refused 429")
    above.set_ylabel("requests/s")
    above.set_yscale("symlog", linthresh=10)
    above.legend()
    below.plot(factors, [each["megabytes"] for each in found], "o-", color="tab:green")
    below.set_ylabel("memory of all processes, MB")
    below.set_ylim(bottom=0)
    below.set_xlabel("offered load, times the capacity")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:3])
