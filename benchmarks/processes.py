"""The processes below one, and their memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

MEGABYTE = 2**20


def below(pid: int) -> dict[int, str]:
    """A process and its descendants: what each is called, by id."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, IndexError):
                parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {process: name for process in found if (name := _name(process))}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process that leads a session; after a minute end all of it."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _name(pid: int) -> str:
    with suppress(OSError):
        title = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        if replica := re.match(r"ray::ServeReplica:\w+:(\w+)", title):
            return replica[1]
        if worker := re.match(r"ray::(\w[\w.]*)", title):
            return worker[1]
        words = [Path(word).name for word in title.split()]
        return next((word for word in words if not re.match(r"python|-", word)), words[0] if words else "")
    return ""


def _field(file: Path, name: str) -> int:
    with suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(pid: int) -> dict[int, tuple[str, float]]:
    """What each of the processes below `pid` is called, and the processor time that it has taken."""
    found = {}
    for process, name in below(pid).items():
        with suppress(OSError, IndexError):
            fields = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()
            found[process] = name.partition(".")[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def memory(pid: int) -> dict[str, float]:
    """Megabytes of the processes below `pid`, by name: shared pages are divided among those that share them."""
    sizes: dict[str, float] = defaultdict(float)
    for process, name in below(pid).items():
        sizes[name] += _field(Path("/proc", str(process), "smaps_rollup"), "Pss:") / MEGABYTE
    return dict(sizes)


@dataclass
class Peaks:
    """The most memory, in megabytes, that any process of each name had of its own, and with what it had mapped of Ray's
    object store, whose pages each process that has touched them counts as well."""

    own: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    with_store: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@contextmanager
def peaks(pid: int, every_s: float = 0.5) -> Iterator[Peaks]:
    """Watch the processes below `pid` until the block is left; what they have of their own is sampled."""
    highest = Peaks()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            for process, name in below(pid).items():
                status = Path("/proc", str(process), "status")
                own = (_field(status, "RssAnon:") + _field(status, "RssFile:")) / MEGABYTE
                highest.own[name] = max(highest.own[name], own)
                highest.with_store[name] = max(highest.with_store[name], _field(status, "VmHWM:") / MEGABYTE)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()
