"""Tar shards: which members are images, how they are read in place, and what damaged or hostile tars come to."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfleet.errors import JobError, SettingsError
from clipfleet.images import load_image
from jobs.items import Item
from jobs.sources import open_files
from jobs.tars import Damaged, members
from tests.deployments.broken import BROKEN
from tests.jobs.job import embed, errors, read, summary
from tests.jobs.planned import embedded, planned

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(file: Path, content: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=format) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def items(source: Path | str) -> list[Item]:
    found = open_files(str(source))
    assert found.shards
    return list(found.items)


@pytest.mark.parametrize("format", FORMATS)
def test_members_lie_where_tarfile_finds_them(tmp_path: Path, format: str) -> None:
    names = ["a.jpg", "x" * 90 + "/" + "y" * 60 + ".png", "größe/ü.webp", "empty.gif", "notes.txt"]
    tar = make_tar(tmp_path / "s.tar", {name: b"z" * (700 * n) for n, name in enumerate(names)}, FORMATS[format])
    data = tar.read_bytes()
    with tarfile.open(tar) as theirs:
        expected = [(member.name, member.offset_data, member.size) for member in theirs]
    found = [member[:3] for member in members(lambda at, size: data[at : at + size], len(data))]
    assert found == expected and len(found) == len(names)


def test_ids_are_shard_and_member_and_what_is_no_image_is_left_out(tmp_path: Path) -> None:
    content = dict.fromkeys(
        ["./a.jpg", "sub//b.PNG", "a.json", ".hidden.png", "sub/._b.png", "/abs/c.png", "../out.png", "x/../../y.png"],
        b"x",
    )
    tar = make_tar(tmp_path / "deep" / "s.tar", content)
    with tarfile.open(tar, "a") as more:
        for name, kind in (("dir.png", tarfile.DIRTYPE), ("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            more.addfile(info)
    found = {item.id: item for item in items(tmp_path)}
    good = ["deep/s.tar/a.jpg", "deep/s.tar/sub/b.PNG", "deep/s.tar/abs/c.png"]
    assert list(found) == [*good, "deep/s.tar/../out.png", "deep/s.tar/x/../../y.png"]
    assert [name for name, item in found.items() if item.error is None] == good
    assert found[good[0]].uri == f"{tar}/a.jpg" and found[good[0]].state.size == 1
    assert items(tar)[0].id == "s.tar/a.jpg"
    assert [item.id for item in items(f"{tmp_path}/**/*.tar")] == list(found)


def test_damaged_tars_are_rows_under_their_own_names(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "whole.tar", {f"{n}.png": bytes([n]) * 2000 for n in range(3)}).read_bytes()
    for name, data in {
        "cut.tar": whole[:4000],
        "cut-between.tar": whole[:2560],
        "overwritten.tar": whole[:2560] + b"\xff" * 512 + whole[3072:],
        "compressed.tar": b"\x1f\x8b\x08" + bytes(1000),
        "empty.tar": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "gone.tar").symlink_to("nowhere.tar")
    found = {item.id: item.error for item in items(tmp_path)}
    assert found == {
        **dict.fromkeys(
            ("compressed.tar", "empty.tar", "cut.tar", "cut-between.tar", "overwritten.tar"), "file_unreadable"
        ),
        **dict.fromkeys(("cut.tar/0.png", "cut-between.tar/0.png", "overwritten.tar/0.png")),
        "gone.tar": "file_not_found",
        **dict.fromkeys(f"whole.tar/{n}.png" for n in range(3)),
    }


def test_zeros_end_a_tar_only_where_nothing_follows_them(tmp_path: Path) -> None:
    """Joined tars are read whole; a header that became zeros is damage, and not the end."""
    first = make_tar(tmp_path / "first.tar", {"a.png": b"a" * 700, "b.png": b"b" * 700}, FORMATS["gnu"]).read_bytes()
    second = make_tar(tmp_path / "second.tar", {"c.png": b"c" * 700, "d.png": b""}, FORMATS["pax"]).read_bytes()
    long = make_tar(tmp_path / "long.tar", {"x" * 200 + ".png": b"", "e.png": b""}, FORMATS["gnu"]).read_bytes()
    folder = tmp_path / "tars"
    folder.mkdir()
    for name, data in {
        "joined.tar": first + second,
        "padded.tar": first + bytes(3 * 2**20),
        "zeroed.tar": first[:1536] + bytes(512) + first[2048:],
        "zeroed-first.tar": bytes(512) + first[512:],
        "zeroed-after-its-name.tar": long[:1024] + bytes(512) + long[1536:],
    }.items():
        (folder / name).write_bytes(data)
    found = {item.id: item.error for item in items(folder)}
    assert found == {
        **dict.fromkeys(f"joined.tar/{name}.png" for name in "abcd"),
        **dict.fromkeys(("padded.tar/a.png", "padded.tar/b.png", "zeroed.tar/a.png")),
        **dict.fromkeys(("zeroed.tar", "zeroed-first.tar", "zeroed-after-its-name.tar"), "file_unreadable"),
    }


@pytest.mark.parametrize("kept", ["size", "time"])
def test_a_tar_that_is_replaced_while_the_job_runs(tmp_path: Path, files: list[bytes], kept: str) -> None:
    """What lies at the planned places is another file's; --changed mends the rows."""
    names = [f"{number}.png" for number in range(4)]
    content = dict(zip(names, files, strict=False))
    tar, dest = make_tar(tmp_path / "s.tar", content), tmp_path / "out"
    before = tar.stat()
    with planned(tar, dest) as run:
        new = make_tar(tmp_path / "new", {name: content[name] for name in names[::-1]} | {"more.png": b"more"})
        if kept == "size":
            with new.open("r+b") as file:
                file.truncate(before.st_size)
            os.utime(new, ns=(0, before.st_mtime_ns + 10**9))
        else:
            os.utime(new, ns=(0, before.st_mtime_ns))
            with new.open("r+b") as file:
                file.truncate(before.st_size + 10240)
            os.utime(new, ns=(0, before.st_mtime_ns))
        assert (new.stat().st_size == before.st_size) == (kept == "size")
        new.replace(tar)
        assert len(run.done()) == 4
    assert errors(read(dest)) == {f"s.tar/{name}": "file_unreadable" for name in names}
    make_tar(tar, dict(reversed(content.items())))
    assert len(embedded(tar, dest, changed=True)) == 4
    assert errors(read(dest)) == {}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_never_leads_astray(data: st.DataObject) -> None:
    """Whatever is overwritten, reading ends, stays within the file, and reads little."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=data.draw(st.sampled_from(list(FORMATS.values())))) as tar:
        for name in ("a.png", "d" * 80 + "/" + "ü" * 30 + ".png", "c.png"):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(600)))
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 20))
        piece = data.draw(st.sampled_from([b"\xff" * 12, b"\x80" + b"\xff" * 11, b"9" * 11, b"S", b"x", b"L", b"-1 "]))
        content[at : at + len(piece)] = piece
        start = at // 512 * 512  # a checksum that fits, so that the damage gets further
        block = bytearray(content[start : start + 512])
        block[148:156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    reads = []

    def read_at(offset: int, size: int) -> bytes:
        assert offset >= 0 and 0 <= size <= 2**20
        reads.append(size)
        return bytes(content[offset : offset + size])

    try:
        for member in members(read_at, len(content)):
            assert 0 <= member.offset <= member.offset + member.size <= len(content)
    except Damaged:
        pass
    assert len(reads) <= len(content) // 256


def test_what_is_refused(tmp_path: Path, files: list[bytes]) -> None:
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(SettingsError, match="compressed"):
        open_files(str(tmp_path / "a.tar.gz"))
    make_tar(tmp_path / "a.tar", {"a.png": files[0]})
    (tmp_path / "b.png").write_bytes(files[0])
    with pytest.raises(JobError, match=r"b\.png"):
        list(open_files(str(tmp_path)).items)
    (tmp_path / "0.png").write_bytes(files[0])
    with pytest.raises(JobError, match=r"a\.tar"):
        list(open_files(str(tmp_path)).items)


def test_members_are_decoded_in_place(tmp_path: Path, files: list[bytes]) -> None:
    content = {f"{n}.png": data for n, data in enumerate(files)} | {
        "cut.png": files[0][:300],
        "huge.png": bytes(21 * 2**20),
    }
    tar = make_tar(tmp_path / "tars" / "s.tar", content)
    with planned(tar, tmp_path / "out", rows_per_file=5) as run:
        assert run.work.pending == len(content)
        found = list(run.decoded())
        with tar.open("r+b") as shard:
            shard.truncate(tar.stat().st_size - 21 * 2**20)
        shorter = [code for rows, _ in run.decoded() for code in rows.column("error").to_pylist()]
        tar.unlink()
        gone = next(run.decoded())[0]
    table = [row for rows, _ in found for row in rows.to_pylist()]
    failed = {row["id"]: row["error"] for row in table if row["error"]}
    assert failed == {"s.tar/cut.png": "image_corrupt", "s.tar/huge.png": BROKEN["over 20 MiB"].code}
    assert shorter == ["file_unreadable"] * len(content)
    pixels = np.concatenate([each for _, each in found])
    assert all(np.array_equal(each, load_image(data)) for each, data in zip(pixels, files, strict=True))
    assert table[3]["size"] == len(files[3]) and table[3]["modified"] is not None
    assert set(gone.column("error").to_pylist()) == {"file_not_found"}


def test_a_mended_tar_is_no_failed_row_any_more(tmp_path: Path, files: list[bytes]) -> None:
    tars, dest = tmp_path / "tars", tmp_path / "out"
    whole = make_tar(tars / "s.tar", {"a.png": files[0], "b.png": files[1]}).read_bytes()
    (tars / "s.tar").write_bytes(whole[: len(whole) // 3])
    with planned(tars, dest) as run:
        assert run.done()[-1] == "s.tar"
    (tars / "s.tar").write_bytes(whole)
    with planned(tars, dest) as run:  # without --retry-errors it counts as finished
        assert "s.tar" not in run.done()
    with planned(tars, dest, retry_errors=True) as run:
        run.done()
    table = read(dest)
    assert sorted(table.column("id").to_pylist()) == ["s.tar/a.png", "s.tar/b.png"] and errors(table) == {}


def test_a_job_over_tars_into_npy(tmp_path: Path, files: list[bytes]) -> None:
    """The whole way once, with --format npy and --max-failures."""
    tars, dest = tmp_path / "tars", tmp_path / "out"
    for number in range(2):
        make_tar(tars / f"{number}.tar", {f"{n}.png": data for n, data in enumerate(files)} | {"bad.png": b"no image"})
    done = embed(tars, dest, "--format", "npy", "--max-failures", "1")
    assert done.status == 1, done.err
    assert done.err.splitlines()[-1].startswith("clipfleet: 2 of 26 rows failed, and --max-failures allows 1.")
    assert "--retry-errors" in done.err and summary(dest)["failed"] == 2
    table = read(dest)
    assert errors(table) == dict.fromkeys(["0.tar/bad.png", "1.tar/bad.png"], "image_format_unsupported")
    by_id = {row["id"]: np.load(dest / row["npy"])[row["row"]] for row in table.to_pylist() if row["error"] is None}
    assert len(by_id) == 24 and all(abs(np.linalg.norm(vector) - 1) < 1e-5 for vector in by_id.values())
    assert all(np.abs(by_id[f"0.tar/{n}.png"] - by_id[f"1.tar/{n}.png"]).max() < 1e-5 for n in range(12))
    again = embed(tars, dest, "--format", "npy", "--max-failures", "8%")
    assert again.status == 3 and "nothing to do" in again.out
