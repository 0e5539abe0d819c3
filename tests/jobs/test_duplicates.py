"""`clipfleet duplicates`: the same groups as by brute force, as a table and as a page."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipfleet.errors import JobError, SettingsError
from jobs import duplicates
from jobs.destination import claim
from jobs.parts import Origin, write
from tests.test_cli import run

ORIGIN = Origin("f1", "tiny", None, "float32", "torch")


def make(
    dest: Path, vectors: np.ndarray, ids: list[str], uris: list[str], format: str = "parquet", per_file: int = 50
) -> None:
    """A DEST with these vectors (n, d), and a failed row in each file."""
    with claim(str(dest)) as claimed:
        for start in range(0, len(ids), per_file):
            rows = list(zip(ids[start : start + per_file], uris[start : start + per_file], strict=True))
            table = pa.table(
                {
                    "id": [*(row for row, _ in rows), f"bad-{start}"],
                    "uri": [*(uri for _, uri in rows), "bad"],
                    "width": pa.array([1] * (len(rows) + 1), pa.int32()),
                    "height": pa.array([1] * (len(rows) + 1), pa.int32()),
                    "error": pa.array([None] * len(rows) + ["image_corrupt"], pa.string()),
                    "size": pa.array([None] * (len(rows) + 1), pa.int64()),
                    "modified": pa.array([None] * (len(rows) + 1), pa.timestamp("us", tz="UTC")),
                }
            )
            write(claimed, ORIGIN, format, table, vectors[start : start + per_file])


def clustered(count: int, dimension: int = 16) -> np.ndarray:
    """Unit vectors, many of them near another one."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(count // 3, dimension))
    vectors = centres[rng.integers(0, len(centres), count)] + rng.normal(scale=0.12, size=(count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def by_brute_force(vectors: np.ndarray, threshold: float) -> set[frozenset[int]]:
    near = vectors @ vectors.T >= threshold
    seen: set[int] = set()
    groups = set()
    for row in range(len(vectors)):
        group, todo = set(), [row]
        while todo:
            if (at := todo.pop()) not in group:
                group.add(at)
                todo += np.flatnonzero(near[at]).tolist()
        if row not in seen and len(group) > 1:
            groups.add(frozenset(group))
        seen |= group
    return groups


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_the_groups_are_those_of_brute_force(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BLOCK", 37)
    vectors = clustered(400)
    ids = [f"{number:04d}" for number in range(400)]
    make(tmp_path, vectors, ids, ids, format)
    order = {
        row["id"]: int(row["id"])
        for part in tmp_path.glob("*.parquet")
        for row in pq.read_table(part).to_pylist()
        if row["error"] is None
    }
    assert len(order) == 400
    for threshold in (0.9, 0.95, 0.99):
        groups = duplicates.find(tmp_path, threshold)
        assert {frozenset(order[member.id] for member in group) for group in groups} == by_brute_force(
            vectors, threshold
        )
        assert [len(group) for group in groups] == sorted(map(len, groups), reverse=True)
        for group in groups:
            scores = vectors[[order[member.id] for member in group]] @ vectors[order[group[0].id]]
            assert np.abs(scores - [member.score for member in group]).max() <= 1e-5


def test_a_long_chain_and_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BLOCK", 16)
    angles = np.random.default_rng(3).permutation(200) * 0.01
    chain = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    same = np.tile(np.array([[0.6, 0.8]], np.float32), (200, 1))
    for name, vectors in (("chain", chain), ("same", same)):
        make(tmp_path / name, vectors, [f"{number}" for number in range(200)], ["x"] * 200)
        (group,) = duplicates.find(tmp_path / name, 0.9999)
        assert len(group) == 200


def test_the_command_writes_a_table_and_a_page(tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 2, 2, 3]]
    ids = ["a", "<script>alert(1)</script>", "c", "d", "e", "f", "g"]
    pictures = []
    for number in range(7):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (300, 200), (number * 30, 0, 0)).save(file)
        pictures.append(str(file))
    pictures[4] = "s3://bucket/not-here.png"
    make(tmp_path / "vectors", vectors, ids, pictures)
    page = tmp_path / "page.html"
    for name in ("table.csv", "table.jsonl", "table.parquet"):
        done = run("duplicates", tmp_path / "vectors", "--out", tmp_path / name, "--page", page)
        assert (done.returncode, done.stdout) == (0, "2 groups, 5 images\n"), done.stderr
    wanted = [(0, "d"), (0, "e"), (0, "f"), (1, "a"), (1, ids[1])]
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [(int(row["group"]), row["id"]) for row in csv.DictReader(file)] == wanted
    lines = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [(row["group"], row["id"]) for row in lines] == wanted and lines[0]["score"] == 1.0
    assert pq.read_table(tmp_path / "table.parquet").to_pylist()[1]["uri"] == "s3://bucket/not-here.png"
    content = page.read_text()
    assert "<script" not in content and "&lt;script&gt;" in content
    assert (
        len(re.findall(r'<img alt="[^"]*" src="data:image/jpeg;base64,', content)) == 4 and "no picture here" in content
    )
    printed = run("duplicates", tmp_path / "vectors", "--json").stdout.splitlines()
    assert [json.loads(line)["id"] for line in printed] == [row for _, row in wanted]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no rows of a job"):
        duplicates.find(tmp_path, 0.9)
    with pytest.raises(SettingsError, match="threshold is 2"):
        duplicates.find(tmp_path, 2)
    with pytest.raises(SettingsError, match=r"none of \.parquet"):
        duplicates.write_table([], tmp_path / "table.txt")
