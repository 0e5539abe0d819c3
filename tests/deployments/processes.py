"""Processes of one instance, found without asking it: by the folder that was its TMPDIR."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest


class Process(NamedTuple):
    """A running process; `started` tells two holders of one id apart."""

    pid: int
    started: str
    title: str  # its command line, or the name that it gave itself


def processes() -> Iterator[Process]:
    """Every process of this machine that is not a zombie."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, IndexError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                title = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if fields[0] != "Z":
                    yield Process(int(entry), fields[19], title.strip())


def of_folder(folder: Path) -> list[Process]:
    """The processes that `folder` gives away: in their command line, environment, working directory or open files."""
    own = os.getpid()
    return [process for process in processes() if process.pid != own and _touches(process, str(folder))]


def _touches(process: Process, folder: str) -> bool:
    home = Path("/proc", str(process.pid))
    with suppress(OSError):
        if folder in process.title or folder.encode() in (home / "environ").read_bytes():
            return True
        links = [home / "cwd", *(home / "fd").iterdir()]
        return any(_target(link).startswith(folder) for link in links)
    return False


def _target(link: Path) -> str:
    with suppress(OSError):
        return os.readlink(link)
    return ""


def below(pid: int) -> list[Process]:
    """The descendants of a process."""
    found: list[Process] = []
    everyone = list(processes())
    parents = {process.pid: _parent(process.pid) for process in everyone}
    wanted = {pid}
    while more := [process for process in everyone if parents[process.pid] in wanted and process not in found]:
        found += more
        wanted |= {process.pid for process in more}
    return found


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def alive(known: list[Process]) -> list[Process]:
    """Those of `known` that still run."""
    running = {(process.pid, process.started) for process in processes()}
    return [process for process in known if (process.pid, process.started) in running]


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition; `seconds` only guards against a hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {what}")
        time.sleep(0.1)


@contextmanager
def private_folder() -> Iterator[Path]:
    """A TMPDIR for one instance. On leaving, nothing may be left that knows it, and nothing may lie in it.

    What is left is ended, by its own id, before the test fails.
    """
    # 14 letters: in a longer one an instance has its own folder elsewhere, because a Unix socket's path may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    try:
        yield folder
        left = of_folder(folder)
        assert not left, f"left running: {left}"
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        assert not files, f"left on disk: {files[:5]}"
    finally:
        end_all(folder)
        shutil.rmtree(folder, ignore_errors=True)


def end_all(folder: Path) -> None:
    """End the processes of a folder, each by its own id."""
    for process in of_folder(folder):
        with suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)
