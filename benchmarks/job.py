"""The offline job over 2,000 and 20,000 images, against the library on the same files, start-up apart.

The files are hard links to the library benchmark's photographs, so that 20,000 of them take no disk. All in int8 with
reduced_jpeg, in which model and decoder are quickest and whatever the job adds weighs most.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import data
from benchmarks.processes import Peaks, peaks
from benchmarks.programs import Program, Spread, ratio, running
from benchmarks.report import Row

SMALL, LARGE = 2_000, 20_000
PRECISION = "int8"


def measure(repetitions: int, notes: list[str]) -> list[Row]:
    checkpoint = data.checkpoint()
    photographs = data.files(data.photographs(data.LIBRARY_FILES))
    library = Program(
        "library", sys.executable, "-m", "benchmarks.library_loop", checkpoint, PRECISION, "reduced", *photographs
    )
    rates: list[float] = []
    theirs: list[float] = []
    small = Peaks()
    with running(library), tempfile.TemporaryDirectory(dir=data.CACHE) as folder:
        for repetition in range(repetitions):
            rate, small = _run(_links(photographs, SMALL, Path(folder, "small")), Path(folder, f"out-{repetition}"))
            rates.append(rate)
            theirs.append(len(photographs) / library.run(len(photographs)))
        before = len(photographs) / library.run(len(photographs))
        large_rate, large = _run(_links(photographs, LARGE, Path(folder, "large")), Path(folder, "out-large"))
        after = len(photographs) / library.run(len(photographs))
    a, b = Spread.of(rates), Spread.of(theirs)
    whole, around = Spread.of([large_rate]), Spread.of([(before + after) / 2])
    for count, found in ((SMALL, small), (LARGE, large)):
        sizes = ", ".join(
            f"{name} {own:.0f} ({found.with_store[name]:.0f})" for name, own in sorted(found.own.items()) if own > 20
        )
        notes.append(f"Peak MB of the job's processes over {count:,} images (with the object store's pages): {sizes}")
    growth = Spread.of([max(large.own[name] / own for name, own in small.own.items() if own > 20)])
    against = "library, same files"
    return [
        Row(f"job, {SMALL:,} images, {PRECISION}, reduced_jpeg", a, "images/s", against, b, ratio(a, b)),
        Row(
            f"job, {LARGE:,} images, {PRECISION}, reduced_jpeg",
            whole,
            "images/s",
            against,
            around,
            ratio(whole, around),
            0.9,
        ),
        Row(
            f"peak memory of a process at {LARGE:,} images, the one that grows most",
            growth,
            "times",
            f"at {SMALL:,}",
            None,
            growth,
            1.1,
            at_most=True,
        ),
    ]


def _links(files: list[Path], count: int, folder: Path) -> Path:
    if not folder.exists():
        folder.mkdir()
        for number in range(count):
            os.link(files[number % len(files)], folder / f"{number:06d}.jpg")
    return folder


def _run(source: Path, dest: Path) -> tuple[float, Peaks]:
    """Images a second, start-up apart, and the highest memory of each kind of process."""
    command = [Path(sys.executable).parent / "clipfleet", "embed", source, dest,
               "--model", data.checkpoint(), "--precision", PRECISION, "--reduced-jpeg"]  # fmt: skip
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        with peaks(process.pid) as highest:
            status = process.wait(3600)
    finally:
        process.kill()
        process.wait()
    summary = json.loads((dest / "_clipfleet.json").read_text())
    assert status == 0 and summary["embedded"] == summary["rows"], summary
    print(f"job: {summary}", flush=True)
    return summary["images_per_second"], highest
