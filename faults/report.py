"""One row a promise: the fault, the load, how often, and what failed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What came of one kind of fault. `kept` says whether the promise was."""

    fault: str
    load: str
    count: int
    outcome: str
    kept: bool

    def __str__(self) -> str:
        return (
            f"| {self.fault} | {self.load} | {self.count} | {self.outcome} | {'kept' if self.kept else '**broken**'} |"
        )


HEAD = "| fault | load | times | outcome | promise |\n| --- | --- | --- | --- | --- |"


def table(rows: list[Row]) -> str:
    """All rows in Markdown."""
    return "\n".join([HEAD, *map(str, rows)])
