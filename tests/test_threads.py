"""How many threads compute, also in a container with a quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clipfleet import threads


@pytest.mark.parametrize(
    ("content", "most"),
    [("max 100000", 10**6), ("150000 100000", 1), ("50000 100000", 1), ("200000 100000", 2), ("", 10**6)],
)
def test_a_containers_quota_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, most: int) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(content)
    monkeypatch.setattr(threads, "_QUOTA", file)
    assert threads.cores() == min(len(os.sched_getaffinity(0)), most)


def test_encoders_take_what_they_reserve_unless_told() -> None:
    assert [threads.of_encoder(cpus, None) for cpus in (0.25, 1, 4)] == [1, 1, 4]
    assert threads.of_encoder(0.25, 2) == 2
    assert 1 <= threads.of_decoder() <= 4
