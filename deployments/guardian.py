"""A small process that outlives `clipfleet serve` and ends what the command left behind, also after `kill -9`.

It runs with the standard library alone, so that it starts at once and stays small.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "CLIPFLEET_INSTANCE"  # every process of an instance inherits this variable; its value is the instance's folder


def start_guardian(folder: Path) -> subprocess.Popen[bytes]:
    """Start the guardian of an instance. It acts when its stdin closes, at the latest when this process dies."""
    code = "import sys; sys.path.append(sys.argv[1]); from deployments.guardian import guard; guard(*sys.argv[2:])"
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-I", "-S", "-c", code, root, str(folder), str(os.getpid())]
    # A session of its own: Ctrl-C and the end of the terminal must not reach it.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _belongs(pid: int, folder: str) -> bool:
    """A process that carries the mark, or (Ray's own write their titles over it) has a file of the folder open for writing."""
    process = Path("/proc") / str(pid)
    with suppress(OSError):
        if f"{MARK}={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
            return True
        for link in (process / "fd").iterdir():
            with suppress(OSError):
                if os.readlink(link).startswith(f"{folder}/") and link.lstat().st_mode & 0o200:
                    return True
    return False


def guard(folder: str, command: str) -> None:
    """Wait until the process `command` has closed our stdin or died; then end the other processes and remove the folder."""
    sys.stdin.buffer.read()
    deadline = time.monotonic() + 20
    clear = 0
    while clear < 3 and time.monotonic() < deadline:  # a process may be born while we look
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()] if os.path.isdir("/proc") else []
        members = [pid for pid in pids if pid not in (os.getpid(), int(command)) and _belongs(pid, folder)]
        clear = 0 if members else clear + 1
        for pid in members:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)
