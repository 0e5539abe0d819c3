"""Programs that are compared, each a process of its own that loads once and then works when told to.

The protocol: the program prints {"ready": true}; for each line {"count": n, "out": FILE or null} on stdin it does its work on
the first n files, writes the vectors to FILE (.npy) if one is given, and prints {"seconds": s}.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class Program:
    def __init__(self, name: str, *arguments: str | Path, **variables: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with status {self._process.wait()}")

    def run(self, count: int, out: Path | None = None) -> float:
        """Seconds for `count` files."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"count": count, "out": str(out) if out else None}) + "\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def memory(self) -> int:
        """The peak of its resident memory in bytes."""
        status = Path("/proc", str(self._process.pid), "status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def running(*programs: Program) -> Iterator[None]:
    try:
        yield
    finally:
        for program in programs:
            program.close()


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({min(self.values):.3g}–{max(self.values):.3g})"


def alternate(programs: Sequence[Program], count: int, repetitions: int) -> list[Spread]:
    """Files a second of each program. They work in turns, and who begins changes every time."""
    rates: list[list[float]] = [[] for _ in programs]
    for repetition in range(repetitions):
        order = range(len(programs)) if repetition % 2 == 0 else reversed(range(len(programs)))
        for index in order:
            rates[index].append(count / programs[index].run(count))
    return [Spread.of(found) for found in rates]


def ratio(ours: Spread, theirs: Spread) -> Spread:
    """The ratio of each pair of turns."""
    return Spread.of([a / b for a, b in zip(ours.values, theirs.values, strict=True)])
