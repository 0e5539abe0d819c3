"""Two thousand files of which forty are broken: a row for each, and what a second start does with them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfleet.checkpoint import find_checkpoint
from clipfleet.fingerprint import fingerprint
from scripts.draw_shapes import draw
from tests.deployments.broken import BROKEN
from tests.deployments.test_isolation import least_difference
from tests.jobs.job import Finished, embed, errors, read, summary, vectors
from tests.library import Library
from tests.pictures import encode

COUNT, BAD, DISTINCT = 2000, 40, 50
KINDS = {"png": "PNG", "JPG": "JPEG", "webp": "WEBP", "bmp": "BMP", "tiff": "TIFF"}
CODES = {
    **{name: broken.code for name, broken in BROKEN.items() if name != "over 20 MiB"},
    "dangling": "file_not_found",
}


class Bulk:
    """The folder, the run over it, and what was to be expected."""

    def __init__(self, folder: Path) -> None:
        self.source, self.dest = folder / "pictures", folder / "vectors"
        rng = random.Random(2000)
        kinds = list(KINDS)
        self.drawings = []
        for number in range(DISTINCT):
            image = draw(rng).image.resize((90 + number, 140 - number))
            suffix = kinds[number % len(kinds)]
            self.drawings.append((suffix, encode(image, KINDS[suffix]), image.size))
        self.bad: dict[str, str] = {}
        self.good: dict[str, int] = {}
        names = list(CODES)
        for number in range(COUNT):
            place = Path(f"shelf {number % 7}", f"größe{number % 3}" if number % 2 else "", f"{number:04d}")
            if number % (COUNT // BAD) == 7:
                kind = names[len(self.bad) % len(names)]
                self._write(f"{place}.png", None if kind == "dangling" else BROKEN[kind].data)
                self.bad[f"{place}.png"] = CODES[kind]
            else:
                suffix, data, _ = self.drawings[number % DISTINCT]
                self._write(f"{place}.{suffix}", data)
                self.good[f"{place}.{suffix}"] = number % DISTINCT
        self._write("notes.txt", b"no image, and no row")
        self._write(".hidden.png", b"neither")
        self.first = embed(self.source, self.dest)

    def _write(self, name: str, data: bytes | None) -> None:
        file = self.source / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            file.symlink_to("nowhere.png")
        else:
            file.write_bytes(data)


@pytest.fixture(scope="module")
def bulk(tmp_path_factory: pytest.TempPathFactory) -> Bulk:
    return Bulk(tmp_path_factory.mktemp("bulk"))


def test_a_row_for_each_file(bulk: Bulk) -> None:
    assert (len(bulk.good), len(bulk.bad)) == (COUNT - BAD, BAD)
    table = read(bulk.dest)
    assert sorted(table.column("id").to_pylist()) == sorted([*bulk.good, *bulk.bad])
    assert errors(table) == bulk.bad
    assert vectors(table).keys() == bulk.good.keys()


def test_the_vectors_are_the_librarys(bulk: Bulk, library: Library) -> None:
    expected = library.images([data for _, data, _ in bulk.drawings])
    assert least_difference(expected) > 1e-3
    found = vectors(read(bulk.dest))
    for name, drawing in bulk.good.items():
        assert np.abs(found[name] - expected[drawing]).max() <= 1e-5
    assert np.abs(np.linalg.norm(np.stack(list(found.values())), axis=1) - 1).max() <= 1e-5


def test_the_files_say_what_they_hold(bulk: Bulk) -> None:
    parts = sorted(bulk.dest.glob("part-*.parquet"))
    assert len(parts) > 1
    for part in parts:
        schema = pq.read_schema(part)
        assert schema.names == ["id", "uri", "embedding", "width", "height", "error", "size", "modified"]
        assert schema.field("embedding").type == pa.list_(pa.float32(), 512)
        metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
        assert metadata["clipfleet.fingerprint"] == fingerprint(find_checkpoint("tiny"))
        assert (metadata["clipfleet.model"], metadata["clipfleet.precision"]) == ("tiny", "float32")
        assert {"clipfleet.revision", "clipfleet.engine"} <= metadata.keys()
    for row in read(bulk.dest).select(["id", "uri", "width", "height", "error"]).to_pylist():
        assert row["uri"] == str(bulk.source / row["id"])
        size = (row["width"], row["height"])
        assert size == ((None, None) if row["error"] else bulk.drawings[bulk.good[row["id"]]][2])
    others = {path.name for path in bulk.dest.iterdir()} - {part.name for part in parts}
    assert others == {"_clipfleet.json", ".clipfleet"}


def test_the_run_says_what_it_did(bulk: Bulk) -> None:
    assert bulk.first.status == 3
    assert f"{COUNT} rows: {COUNT - BAD} embedded, {BAD} failed" in bulk.first.out
    codes = list(bulk.bad.values())
    assert all(f"{codes.count(code)} {code}" in bulk.first.out for code in set(codes))
    # Nothing but our own progress: Ray's words stay in its logs.
    lines = bulk.first.err.splitlines()
    progress = r"Embedding: \d+/2000 images, [\d.]+ images/s, [\d:]+ left"
    assert lines and all(re.fullmatch(progress, line) for line in lines), bulk.first.err
    assert lines.count(lines[-1]) == 1 and lines[-1].startswith("Embedding: 2000/2000")
    written = summary(bulk.dest)
    assert list(written) == [
        "rows", "embedded", "failed", "gone", "skipped", "errors", "images_per_second", "seconds", "startup_seconds",
        "fingerprint", "model", "precision", "engine", "jpegs",
    ]  # fmt: skip
    assert (written["rows"], written["embedded"], written["failed"], written["skipped"]) == (COUNT, COUNT - BAD, BAD, 0)
    assert written["errors"] == {code: codes.count(code) for code in sorted(set(codes))}


def state(dest: Path) -> dict[str, int]:
    return {part.name: part.stat().st_mtime_ns for part in dest.glob("part-*.parquet")}


def test_a_second_start_embeds_nothing_and_says_so(bulk: Bulk) -> None:
    before = state(bulk.dest)
    again = embed(bulk.source, bulk.dest)
    assert again.status == 3 and "nothing to do: every input was finished before" in again.out and again.err == ""
    assert "--retry-errors does those again" in again.out
    assert state(bulk.dest) == before
    assert summary(bulk.dest)["skipped"] == COUNT


def test_another_fingerprint_is_refused(bulk: Bulk, checkpoints: dict[str, Path]) -> None:
    before = state(bulk.dest)
    refused = embed(bulk.source, bulk.dest, model=checkpoints["clip"])
    assert refused.status == 1 and refused.err.count("\n") == 1
    assert all(fingerprint(find_checkpoint(str(name))) in refused.err for name in ("tiny", checkpoints["clip"]))
    assert state(bulk.dest) == before


def test_an_id_in_two_files_is_named_with_both(bulk: Bulk) -> None:
    part = sorted(bulk.dest.glob("part-*"))[1]
    copied = bulk.dest / "part-copied.parquet"
    shutil.copy(part, copied)
    try:
        done = embed(bulk.source, bulk.dest)
        assert done.status == 1 and part.name in done.err and copied.name in done.err, done.err
    finally:
        copied.unlink()


def test_retry_errors_redoes_failed_rows_alone(bulk: Bulk, tmp_path: Path) -> None:
    source, dest = tmp_path / "pictures", tmp_path / "vectors"
    shutil.copytree(bulk.source, source, symlinks=True)
    shutil.copytree(bulk.dest, dest)
    mended = list(bulk.bad)[:15]
    for name in mended:
        file = source / name
        file.unlink()
        file.write_bytes(bulk.drawings[0][1])
    (source / "new.png").write_bytes(bulk.drawings[1][1])
    before = vectors(read(dest))
    again: Finished = embed(source, dest, "--retry-errors", "--json")
    assert again.status == 3, again.err
    table = read(dest)
    assert sorted(table.column("id").to_pylist()) == sorted([*bulk.good, *bulk.bad, "new.png"])
    assert errors(table) == {name: code for name, code in bulk.bad.items() if name not in mended}
    after = vectors(table)
    assert all(np.array_equal(after[name], vector) for name, vector in before.items())
    assert after.keys() - before.keys() == {*mended, "new.png"}
    assert summary(dest)["skipped"] == len(bulk.good)
    assert json.loads(again.out) == summary(dest)


def test_names_that_are_no_unicode(bulk: Bulk, tmp_path: Path) -> None:
    source = os.fsencode(tmp_path / "names")
    os.mkdir(source)
    names = [b"caf\xe9.png", b"a b\tc.png", b"line\nbreak.png", b"100%.png", b"[x].png", b"x" * 250 + b".png"]
    for name in names:
        Path(os.fsdecode(os.path.join(source, name))).write_bytes(bulk.drawings[0][1])
    done = embed(tmp_path / "names", tmp_path / "vectors")
    assert done.status == 0, done.err
    assert len(vectors(read(tmp_path / "vectors"))) == len(names)
    assert embed(tmp_path / "names", tmp_path / "vectors").out.count("nothing to do") == 1
