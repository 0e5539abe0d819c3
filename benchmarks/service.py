"""Requests to vectors over HTTP, with the load generator on the same cores: `clipfleet serve` against infinity-emb and
LitServe, and against the library on the same files.

All get the same photographs: clipfleet as raw bytes, the others as the base64 that their APIs take. Every repetition starts,
warms, loads and stops one service after the other, and runs the library between them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks import data
from benchmarks.programs import Program, Spread, ratio, running
from benchmarks.report import Row
from benchmarks.services import Service, Work, clipfleet, infinity, litserve

FILES = 96
SETTINGS = (("float32", "whole"), ("int8", "reduced"))  # precision, how JPEGs are decoded


def measure(repetitions: int, notes: list[str]) -> list[Row]:
    checkpoint = data.checkpoint()
    paths = data.files(data.photographs(data.LIBRARY_FILES))[:FILES]
    work = Work([path.read_bytes() for path in paths])
    loop = (sys.executable, "-m", "benchmarks.library_loop", checkpoint)
    libraries = [
        Program(f"library, {precision}, {jpeg}", *loop, precision, jpeg, *paths) for precision, jpeg in SETTINGS
    ]
    rates: list[list[float]] = [[] for _ in SETTINGS]
    with tempfile.TemporaryDirectory() as folder, running(*libraries):
        ours = [clipfleet(checkpoint, Path(folder), precision, jpeg) for precision, jpeg in SETTINGS]
        peers = {"infinity": infinity(checkpoint), "litserve": litserve(checkpoint)}
        sides = [*ours, *peers.values()]
        for repetition in range(repetitions):
            for side in sides if repetition % 2 == 0 else reversed(sides):
                _try(side, work, peers, notes)
            for found, program in zip(rates, libraries, strict=True):
                found.append(FILES / program.run(FILES))
    for side in sides:
        sizes = ", ".join(f"{name} {size:.0f}" for name, size in sorted(side.megabytes.items()) if size >= 5)
        notes.append(f"Memory of {side.name} under load, MB a kind of process (shared pages divided): {sizes}")
    rows: list[Row] = []
    for (precision, jpeg), service, found in zip(SETTINGS, ours, rates, strict=True):
        rows += _rows(
            service, precision, f"{precision}{', reduced_jpeg' * (jpeg == 'reduced')}", peers, Spread.of(found)
        )
    return rows


def _try(side: Service, work: Work, peers: dict[str, Service], notes: list[str]) -> None:
    try:
        side.measure(work)
    except RuntimeError as error:
        if side not in peers.values():
            raise
        notes.append(f"{side.name} could not be measured: {str(error)[:1000]}")


def _rows(ours: Service, precision: str, setting: str, peers: dict[str, Service], library: Spread) -> list[Row]:
    exact = precision == "float32"

    def figure(side: Service, name: str, part: str) -> Spread:
        scale = 1 if part == "rate" else 1000
        return Spread.of([getattr(found, part) * scale for found in side.loads[name]])

    def against(
        peer: Service, work: str, name: str, part: str, target: float | None = None, *, at_most: bool = False
    ) -> list[Row]:
        if len(peer.loads.get(name, ())) < len(ours.loads[name]):
            return []
        a, b = figure(ours, name, part), figure(peer, name, part)
        unit = "/s" if part == "rate" else f"ms {part}"
        return [Row(f"{work}, {setting}", a, unit, peer.name, b, ratio(a, b), target, at_most)]

    one = "one image a request"
    infinity, litserve = peers["infinity"], peers["litserve"]
    rows = [
        *against(infinity, f"service, 16 clients, {one}", "16 clients", "rate", 1.6 if exact else 4),
        *against(infinity, f"service, 16 clients, {one}", "16 clients", "p50", 1, at_most=True),
        *against(infinity, f"service, 16 clients, {one}", "16 clients", "p99", 1, at_most=True),
        *against(infinity, f"service, 1 client, {one}", "1 client", "p50", 1 if exact else 0.5, at_most=True),
        *against(infinity, f"service, 64 clients, {one}", "64 clients", "rate"),
        *against(infinity, "service, 16 images a request, 4 clients", "16 images a request", "rate"),
        *against(infinity, "service, texts, 16 clients", "texts", "rate", 2.3 if exact else 5),
        *against(litserve, f"service, 16 clients, {one}", "16 clients", "rate"),
        *against(litserve, "service, texts, 16 clients", "texts", "rate"),
    ]
    for name, target in (
        ("16 clients", 0.85 if exact else 0.75),
        ("16 clients, base64 in JSON", 0.75 if exact else 0.65),
    ):
        a = figure(ours, name, "rate")
        what = "raw bytes" if name == "16 clients" else "base64 in JSON"
        rows.append(
            Row(f"service, 16 clients, {what}, {setting}", a, "/s", "library", library, ratio(a, library), target)
        )
    sizes = Spread.of(ours.batch_sizes)
    rows.append(Row(f"mean batch, 64 clients, max 32, {setting}", sizes, "images", "", None, sizes, 16))
    for part, target, at_most in (("rate", 0.95, False), ("p99", 5, True)):
        a, b = figure(ours, "64 clients", part), figure(ours, "16 clients", part)
        unit = "/s" if part == "rate" else "ms p99"
        rows.append(Row(f"service, 64 clients, {setting}", a, unit, "16 clients", b, ratio(a, b), target, at_most))
    a, b = figure(ours, "text beside images", "p50"), figure(ours, "text alone", "p50")
    rows.append(
        Row(f"a text while images saturate, {setting}", a, "ms p50", "a text alone", b, ratio(a, b), 3, at_most=True)
    )
    return rows
