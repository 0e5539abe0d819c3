"""Turns at decoding large images, for which the processes of a node wait: many at once would need more memory than it has."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

LARGE_BYTES = 200_000_000  # of decoding_bytes(): a photograph of over 25 megapixels
TURN_S = 600.0  # as long as many that wait take, and no longer: who has a turn may hang when nobody is left to end it
_BYTES_A_TURN = 4 * 2**30  # the largest image takes a third of it
_LOOK_S = 0.05
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # cgroup 2: bytes, or "max"


def count() -> int:
    """How many large images this node may decode at once."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        memory = min(memory, int(_LIMIT.read_text()))
    return max(1, memory // _BYTES_A_TURN)


def paths() -> list[Path]:
    """The files whose locks are the turns."""
    return [Path(tempfile.gettempdir(), f"clipfleet-turn-{os.getuid()}-{number}") for number in range(count())]


@contextmanager
def turn(seconds: float) -> Iterator[None]:
    """Wait for a turn, `seconds` at most, and hold it. A process that dies gives it back."""
    end = time.monotonic() + seconds
    with ExitStack() as files:
        locks: list[int] = []
        for path in paths():
            with suppress(OSError):  # somebody else's file, or a full disk: then without
                locks.append(files.enter_context(path.open("a")).fileno())
        while locks and not any(map(_take, locks)) and time.monotonic() < end:
            time.sleep(_LOOK_S)
        yield


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
