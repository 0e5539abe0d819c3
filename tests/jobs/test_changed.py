"""--changed: files that are not what they were are done again, rows whose files have gone say so, and no id is doubled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from clipfleet.errors import JobError, SettingsError
from tests.jobs.job import errors, read, vectors
from tests.jobs.planned import embedded, planned
from tests.jobs.test_tars import make_tar


@pytest.fixture
def source(tmp_path: Path, files: list[bytes]) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, data in enumerate(files):
        (folder / f"{number:02d}.png").write_bytes(data)
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def touch(file: Path, seconds: int = 5) -> None:
    """Give a file another time."""
    os.utime(file, ns=(0, file.stat().st_mtime_ns + seconds * 10**9))


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_changed_new_and_gone(source: Path, tmp_path: Path, files: list[bytes], format: str) -> None:
    dest = tmp_path / "out"
    options = {"format": format, "rows_per_file": 4}
    assert len(embedded(source, dest, **options)) == 13
    states = {row["id"]: row for row in read(dest).to_pylist()}
    assert states["03.png"]["size"] == len(files[3])
    assert states["03.png"]["modified"].timestamp() == pytest.approx((source / "03.png").stat().st_mtime, abs=1e-5)
    assert embedded(source, dest, changed=True, **options) == []

    (source / "00.png").write_bytes(files[5])  # another size
    touch(source / "01.png")
    touch(source / "bad.png")
    before = (source / "02.png").stat()
    (source / "02.png").unlink()
    (source / "new.png").write_bytes(files[6])
    assert embedded(source, dest, **options) == ["new.png"], "not asked for, nothing else is looked at"
    with planned(source, dest, changed=True, **options) as run:
        assert run.retired == ["02.png"]
        assert run.work.before == 14 - 3
        assert run.done() == ["00.png", "01.png", "bad.png"]
    table = read(dest)
    ids = table.column("id").to_pylist()
    assert sorted(ids) == sorted([*states, "new.png"])
    assert errors(table) == {"02.png": "gone", "bad.png": "image_format_unsupported"}
    assert {row["id"]: row["size"] for row in table.to_pylist()}["00.png"] == len(files[5])
    assert embedded(source, dest, changed=True, **options) == []

    (source / "02.png").write_bytes(files[2])
    os.utime(source / "02.png", ns=(0, before.st_mtime_ns))  # as on a disk that was not mounted
    assert embedded(source, dest, **options) == []
    assert embedded(source, dest, changed=True, **options) == ["02.png"]
    assert errors(read(dest)).keys() == {"bad.png"} and len(read(dest)) == 14
    if format == "npy":
        rows = [row for row in read(dest).to_pylist() if row["error"] is None]
        named = {row["npy"] for row in rows}
        assert {path.name for path in dest.glob("*.npy")} == named, "no leftovers"
        assert sum(len(np.load(dest / name)) for name in named) == len(rows) == 13


def test_a_dest_of_a_version_without_states_is_done_again_once(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    embedded(source, dest)
    for part in dest.glob("part-*"):
        pq.write_table(pq.read_table(part).drop_columns(["size", "modified"]), part)
    assert embedded(source, dest) == []
    before = vectors(read(dest))
    assert len(before) == 12
    assert len(embedded(source, dest, changed=True)) == 13
    assert embedded(source, dest, changed=True) == []
    assert len(read(dest)) == 13


def test_old_rows_are_rewritten_beside_new_ones(source: Path, tmp_path: Path, files: list[bytes]) -> None:
    dest = tmp_path / "out"
    embedded(source, dest)
    for part in dest.glob("part-*"):
        pq.write_table(pq.read_table(part).drop_columns(["size", "modified"]), part)
    (source / "bad.png").write_bytes(files[0])
    assert embedded(source, dest, retry_errors=True) == ["bad.png"]
    tables = [pq.read_table(part) for part in dest.glob("part-*")]
    assert sorted(name for table in tables for name in table.column("id").to_pylist()) == sorted(
        path.name for path in source.iterdir()
    )


def test_manifests_and_tars(source: Path, tmp_path: Path, files: list[bytes]) -> None:
    manifest = tmp_path / "m.jsonl"
    paths = [f"pictures/{number:02d}.png" for number in range(4)] + ["pictures/gone.png"]
    manifest.write_text("".join(json.dumps({"path": path}) + "\n" for path in [*paths, (source / "05.png").as_uri()]))
    assert len(embedded(manifest, tmp_path / "out")) == 6
    assert errors(read(tmp_path / "out")) == {"pictures/gone.png": "file_not_found"}
    touch(source / "01.png")
    (source / "02.png").unlink()
    (source / "gone.png").write_bytes(files[0])
    assert embedded(manifest, tmp_path / "out", changed=True) == ["pictures/01.png", "pictures/gone.png"]
    assert errors(read(tmp_path / "out")) == {"pictures/02.png": "gone"}

    tar = make_tar(tmp_path / "s.tar", {"a.png": files[0], "b.png": files[1]})
    assert len(embedded(tar, tmp_path / "members")) == 2
    assert embedded(tar, tmp_path / "members", changed=True) == []
    make_tar(tar, {"b.png": files[1], "c.png": files[2]})
    touch(tar)
    assert embedded(tar, tmp_path / "members", changed=True) == ["s.tar/b.png", "s.tar/c.png"]
    assert errors(read(tmp_path / "members")) == {"s.tar/a.png": "gone"}


def test_what_could_not_be_read_is_done_again_though_it_is_the_same_file(
    source: Path, tmp_path: Path, files: list[bytes]
) -> None:
    """As after an outage of the file system that it is on."""
    dest, rows = tmp_path / "out", {"00.png": "file_unreadable", "01.png": "file_not_found", "02.png": "image_corrupt"}
    embedded(source, dest)
    for part in dest.glob("part-*"):
        table = pq.read_table(part)
        codes = [rows.get(row["id"], row["error"]) for row in table.to_pylist()]
        column = table.column_names.index("error")
        pq.write_table(table.set_column(column, table.schema.field(column), [codes]), part)
    assert embedded(source, dest) == []
    away = source / "01.png"
    away.rename(tmp_path / "01.png")
    assert embedded(source, dest, changed=True) == ["00.png"], "where there is no file, nothing can have got better"
    assert errors(read(dest))["01.png"] == "gone"
    (tmp_path / "01.png").rename(away)
    assert embedded(source, dest, changed=True) == ["01.png"]
    assert errors(read(dest)) == {"02.png": "image_corrupt", "bad.png": "image_format_unsupported"}
    assert embedded(source, dest, changed=True) == []
    assert embedded(source, dest, retry_errors=True) == ["02.png", "bad.png"]


@pytest.mark.parametrize("again", [{}, {"retry_errors": True}], ids=["changed", "and retried"])
def test_failed_rows_of_a_manifest_whose_files_have_gone_say_so(
    source: Path, tmp_path: Path, files: list[bytes], again: dict[str, bool]
) -> None:
    """As those of a folder do."""
    manifest, dest, options = tmp_path / "m.csv", tmp_path / "out", {"changed": True, **again}
    (source / "unreadable.png").mkdir()
    names = ["00.png", "bad.png", "unreadable.png", "never.png"]
    manifest.write_text("path\n" + "".join(f"pictures/{name}\n" for name in names) + '""\n')
    embedded(manifest, dest)
    codes = {"pictures/bad.png": "image_format_unsupported", "pictures/unreadable.png": "file_unreadable"}
    assert errors(read(dest)) == {**codes, "pictures/never.png": "file_not_found", "#4": "file_not_found"}
    embedded(manifest, dest, retry_errors=True)
    assert errors(read(dest)) == {**codes, "pictures/never.png": "file_not_found", "#4": "file_not_found"}
    (source / "bad.png").unlink()
    (source / "unreadable.png").rmdir()
    gone = {f"pictures/{name}": "gone" for name in names[1:]}
    done = embedded(manifest, dest, **options)
    assert done == (["#4"] if again else []), "a row without a path has no file that could have gone"
    assert errors(read(dest)) == {**gone, "#4": "file_not_found"}
    assert embedded(manifest, dest, retry_errors=True) == ["#4"]
    for name in names[1:]:
        (source / name).write_bytes(files[1])
    assert embedded(manifest, dest, changed=True) == list(gone)
    assert errors(read(dest)) == {"#4": "file_not_found"} and len(read(dest)) == 5


def test_a_member_that_its_header_rules_out_is_not_tried_each_time(tmp_path: Path, files: list[bytes]) -> None:
    tar = make_tar(tmp_path / "s.tar", {"../out.png": files[0], "a.png": files[1]})
    assert len(embedded(tar, tmp_path / "out")) == 2
    assert errors(read(tmp_path / "out")) == {"s.tar/../out.png": "file_unreadable"}
    assert embedded(tar, tmp_path / "out", changed=True) == []


def test_killed_between_the_plan_and_the_work_nothing_is_lost(source: Path, tmp_path: Path) -> None:
    """The old rows are out of DEST by then, so that an id can be there once at most; the next start does the files."""
    dest = tmp_path / "out"
    embedded(source, dest)
    touch(source / "01.png")
    with planned(source, dest, changed=True) as run:
        assert run.work.pending == 1
    assert "01.png" not in read(dest).column("id").to_pylist()
    assert embedded(source, dest) == ["01.png"]
    assert len(read(dest)) == 13


def test_an_empty_source_marks_nothing(source: Path, tmp_path: Path) -> None:
    """More likely a disk that is not mounted."""
    embedded(source, tmp_path / "out")
    shutil.move(source, tmp_path / "elsewhere")
    source.mkdir()
    with pytest.raises(SettingsError, match="holds no images"):
        embedded(source, tmp_path / "out", changed=True)
    assert errors(read(tmp_path / "out")).keys() == {"bad.png"}


def test_npy_files_of_others_stay(source: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out" / "part-0001.npy"
    theirs.parent.mkdir()
    theirs.write_bytes(b"somebody else's")
    embedded(source, tmp_path / "out", format="npy")
    assert theirs.read_bytes() == b"somebody else's"


def test_a_tar_that_cannot_be_read_loses_no_member(tmp_path: Path, files: list[bytes]) -> None:
    content = {f"{number}.png": data for number, data in enumerate(files[:3])}
    tars = [make_tar(tmp_path / "tars" / f"{name}.tar", content) for name in "ab"]
    dest = tmp_path / "out"
    assert len(embedded(tmp_path / "tars", dest)) == 6
    whole = tars[0].read_bytes()
    for damaged in (whole[:700], bytes(512) + whole[512:]):
        tars[0].write_bytes(damaged)
        embedded(tmp_path / "tars", dest, changed=True)
        assert "gone" not in errors(read(dest)).values()
        assert errors(read(dest))["a.tar"] == "file_unreadable"
    tars[0].write_bytes(whole)
    embedded(tmp_path / "tars", dest, changed=True)
    assert errors(read(dest)) == {} and len(read(dest)) == 6


def test_a_manifest_none_of_whose_files_is_there_changes_nothing(source: Path, tmp_path: Path) -> None:
    manifest, dest = tmp_path / "list.csv", tmp_path / "out"
    manifest.write_text("path\n" + "".join(f"{file}\n" for file in sorted(source.glob("0*.png"))))
    count = len(embedded(manifest, dest))
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(JobError, match=f"none of the {count} files .* mounted"):
        embedded(manifest, dest, changed=True)
    assert errors(read(dest)) == {}
