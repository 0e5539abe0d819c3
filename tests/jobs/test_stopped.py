"""Jobs that are killed, stopped, doubled or misplaced: nothing is lost, nothing is done twice, nothing is left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clipfleet.threads import cores
from scripts.draw_shapes import draw
from tests.deployments.processes import Process, of_folder, until
from tests.deployments.service import Command
from tests.jobs.job import embed, embedding, errors, read, summary
from tests.pictures import encode

COUNT = 1500
SOME = 400
WORKERS = {"decodes": ("ray::MapBatches",), "encodes": ("ray::MapWorker", "ray::_MapWorker")}
SECONDS = 120  # only guards against a hang
GOES_ON = "What is finished is kept; the same command goes on from there"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that take a while to decode, so that a job can be met half way."""
    folder = tmp_path_factory.mktemp("source")
    rng = random.Random(4)
    drawings = [encode(draw(rng, (900, 700)).image, "PNG") for _ in range(10)]
    for number in range(COUNT):
        (folder / f"{number:04d}.png").write_bytes(drawings[number % len(drawings)])
    # A first encoder converts its tower, and while it does all pictures are decoded: no job could be met half way.
    one = tmp_path_factory.mktemp("one")
    os.link(folder / "0000.png", one / "0000.png")
    assert embed(one, tmp_path_factory.mktemp("converted")).status == 0
    return folder


def parts(dest: Path) -> dict[str, int]:
    return {part.name: part.stat().st_mtime_ns for part in dest.glob("part-*.parquet")}


def grow(source: Path, dest: Path, left: int, more_of: Path) -> int:
    """Link pictures into `source` until `left` are to be done, however much the last job had done; returns how many it has."""
    pictures = sorted(more_of.iterdir())
    count, done = len(list(source.iterdir())), len(read(dest)) if parts(dest) else 0
    for number in range(count, done + left):
        os.link(pictures[number % len(pictures)], source / f"{number:05d}.png")
    return max(count, done + left)


@contextmanager
def half_way(source: Path, dest: Path) -> Iterator[Command]:
    """A job that has written another file since it began, and has not finished."""
    before = parts(dest)
    with embedding(source, dest) as command:
        until(lambda: command.ended or len(parts(dest)) > len(before), SECONDS, "a file of a running job")
        assert not command.ended and len(read(dest)) < len(list(source.iterdir())), command.err
        yield command
    assert parts(dest).items() >= before.items(), "what was finished is untouched"


def said(command: Command) -> list[str]:
    assert "Traceback" not in command.err
    return [line for line in command.err.splitlines() if not line.startswith("Embedding: ")]


def kill_all(folder: Path) -> list[Process]:
    """Kill what is there now, its guardian too. One of them may just have started another that we do not see yet."""
    found = of_folder(folder)
    for process in found:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return found


def test_stopped_and_killed_in_every_way_and_finished(
    source: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One job, gone on with by the same command each time."""
    pictures, source = source, tmp_path_factory.mktemp("growing")
    # All that is decoded before the first encoder is up counts as in flight, which the first signal lets finish.
    count = grow(source, tmp_path, 2000, pictures)
    with half_way(source, tmp_path) as command:
        before = len(parts(tmp_path))
        command.send(signal.SIGINT)
        assert command.wait(SECONDS) == 1
        rows = len(read(tmp_path))
        assert said(command) == [
            "clipfleet: stopping: finishing what is in flight, 30 s at most; once more stops at once",
            f"clipfleet: stopped: {rows} of {count} images are done. {GOES_ON}",
        ]
    assert len(parts(tmp_path)) > before and rows < count
    assert list((tmp_path / ".clipfleet").glob("run-*")) == []
    sizes = [pq.ParquetFile(part).metadata.num_rows for part in tmp_path.glob("part-*")]
    assert any(size < max(sizes) for size in sizes), "a file that was half decoded is written with what it had"

    grow(source, tmp_path, 1000, pictures)
    with half_way(source, tmp_path) as command:
        (raylet,) = [process for process in of_folder(command.folder) if "/raylet/raylet" in process.title]
        os.kill(raylet.pid, signal.SIGKILL)
        assert command.wait(SECONDS) == 1
        assert said(command) == [f"clipfleet: the job stopped: its Ray has died (raylet). {GOES_ON}"]

    grow(source, tmp_path, 1000, pictures)
    with half_way(source, tmp_path) as command:
        until(lambda: not kill_all(command.folder), SECONDS, "an end of all its processes")
        command.wait(SECONDS)
        for left in command.folder.iterdir():  # its guardian, killed as well, would have done it
            shutil.rmtree(left, ignore_errors=True)
    assert not (tmp_path / "_clipfleet.json").exists()

    count = grow(source, tmp_path, 1000, pictures)
    with half_way(source, tmp_path) as command:
        command.send(signal.SIGKILL)
        before = parts(tmp_path)
        with embedding(source, tmp_path) as last:  # while workers of the first may live on
            killed = _kill_workers(last)
            assert last.wait(SECONDS) == 0, last.err
        until(lambda: not of_folder(command.folder), 30, "an end of the first one's processes")
    assert killed == set(WORKERS)  # which are replaced
    assert sorted(read(tmp_path).column("id").to_pylist()) == sorted(file.name for file in source.iterdir())
    assert errors(read(tmp_path)) == {}
    assert parts(tmp_path).items() >= before.items() and before
    assert summary(tmp_path)["rows"] == count and 0 < rows < summary(tmp_path)["skipped"] < count


def _kill_workers(command: Command) -> set[str]:
    """Kill one that decodes and one that encodes, when there are both; returns which."""
    found: dict[str, Process] = {}

    def met() -> bool:
        for process in of_folder(command.folder):
            if kind := next((kind for kind, titles in WORKERS.items() if process.title.startswith(titles)), None):
                found.setdefault(kind, process)
        return len(found) == len(WORKERS) or command.ended

    until(met, SECONDS, "workers")
    for process in found.values():
        os.kill(process.pid, signal.SIGKILL)
    return set(found)


def test_a_second_signal_stops_it_at_once(source: Path, tmp_path: Path) -> None:
    with half_way(source, tmp_path) as command:
        encoders = [process for process in of_folder(command.folder) if "EncodeActor" in process.title]
        for process in encoders:  # so that what is in flight stays there
            os.kill(process.pid, signal.SIGSTOP)
        command.send(signal.SIGTERM)
        command.wait_for("clipfleet: stopping")
        assert not command.ended
        command.send(signal.SIGTERM)
        assert command.wait(SECONDS) == 1
        assert said(command)[-1].endswith(f" of {COUNT} images are done. {GOES_ON}")


def test_a_dest_that_vanishes_stops_it_with_one_line(source: Path, tmp_path: Path) -> None:
    """An error of an encoder or a decode task, as it comes through Ray."""
    dest, away = tmp_path / "dest", tmp_path / "away"
    with half_way(source, dest) as command:
        dest.rename(away)
        assert command.wait(SECONDS) == 1
        assert said(command) == [
            f"clipfleet: DEST {str(dest)!r} has vanished while the job ran. Bring it back, or start anew"
        ]
        away.rename(dest)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_stops_it_with_one_line(
    source: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    some = tmp_path_factory.mktemp("some")
    for file in sorted(source.iterdir())[:SOME]:
        os.link(file, some / file.name)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=240k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("root may not mount a small disk here")
    try:
        done = embed(some, tmp_path)
        assert done.status == 1, done.err
        *_, line = [line for line in done.err.splitlines() if not line.startswith("Embedding: ")]
        assert "No space left on device" in line and str(tmp_path) in line and GOES_ON in line
        kept = read(tmp_path).column("id").to_pylist()  # whole files only
        assert 0 < len(kept) < SOME
        subprocess.run(["mount", "-o", "remount,size=64m", tmp_path], check=True)
        assert embed(some, tmp_path).status == 0
        ids = read(tmp_path).column("id").to_pylist()
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert sorted(ids) == sorted(file.name for file in some.iterdir())


def test_two_jobs_on_one_dest(source: Path, tmp_path: Path) -> None:
    with embedding(source, tmp_path) as command:
        until(lambda: (tmp_path / ".clipfleet" / "lock").exists() or command.ended, SECONDS, "the first one's lock")
        second = embed(source, tmp_path)
        assert second.status == 1 and str(tmp_path) in second.err and "another job" in second.err
        command.send(signal.SIGTERM)
        assert command.wait(SECONDS) == 1


def test_actors_that_have_no_room(source: Path, tmp_path: Path) -> None:
    done = embed(source, tmp_path, "--actors", "500")
    assert done.status == 1 and done.err.count("\n") == 1, done.err
    assert "500 actors" in done.err and "ask for 250.5 CPUs" in done.err, done.err
    assert f"free are {max(2, cores())} CPUs" in done.err


def test_a_cluster_that_is_not_there(source: Path, tmp_path: Path) -> None:
    done = embed(source, tmp_path, "--address", "127.0.0.1:9")
    assert done.status == 1 and "'127.0.0.1:9'" in done.err and "Traceback" not in done.err
