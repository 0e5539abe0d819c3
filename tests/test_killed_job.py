"""How `make chaos` judges the job that it kills."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from faults import job

GOOD = Counter({"second jobs refused": 1, "driver": 2, "node while a file was written": 1})


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (GOOD, []),
        (Counter({"second jobs refused": 1, "driver": 3}), ["no kill while a file was written"]),
        (GOOD + Counter([job.STOPPED]), ["1 x stopped by itself"]),
        (GOOD + Counter([job.LATE]), ["1 x no job at work within ten minutes"]),
        (GOOD + Counter(["start refused beside what was left"]), []),
        (Counter({"node while a file was written": 1}), ["a second job was not refused"]),
    ],
)
def test_what_the_kills_have_to_meet(seen: Counter[str], words: list[str]) -> None:
    assert job._unlike_what_is_claimed(seen) == words


class Ended:
    """A job that ended with status 1 and these last lines, one a start; after them it is finished."""

    lines: list[str] = []  # noqa: RUF012

    def __init__(self, *_: Any, **__: Any) -> None:
        self.last_line = self.lines.pop(0) if self.lines else ""
        self.status = 1 if self.last_line else 3

    def close(self) -> list[int]:
        return []


def met(monkeypatch: pytest.MonkeyPatch, lines: list[str], last: str) -> Counter[str]:
    seen: Counter[str] = Counter()
    monkeypatch.setattr(job, "Job", Ended)
    monkeypatch.setattr(job.time, "sleep", lambda _: None)
    monkeypatch.setattr(Ended, "lines", list(lines))
    there: Any = Ended()
    job._running(there, job.Images(Path(), {}), Path(), Path(), seen, 1, [], last)
    return seen


def test_a_job_may_end_with_its_node_once_and_be_refused_beside_what_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    refused, other = "another job is writing to it", "something else"
    assert not met(monkeypatch, [other], "node")[job.STOPPED]
    assert met(monkeypatch, [other, other], "node")[job.STOPPED] == 1
    assert met(monkeypatch, [other], "driver")[job.STOPPED] == 1
    assert met(monkeypatch, [refused, other], "node")[job.STOPPED] == 1
    assert not met(monkeypatch, [refused, refused], "driver")[job.STOPPED]


def test_starts_that_are_refused_for_ever_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_LATE_S", 0.1)
    assert met(monkeypatch, ["another job is writing to it"] * 10**6, "driver")[job.LATE] == 1


def test_a_full_disk_that_is_not_tried_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    row = job.full_disk()
    assert (row.count, row.kept) == (0, False)
    assert "not run" in row.outcome
