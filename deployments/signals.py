"""What a running `clipfleet serve` does with signals: SIGINT and SIGTERM stop it, SIGHUP has it read its config file again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def stop_on_signals() -> None:
    """Ctrl-C too is set: a shell starts background jobs with it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


@contextmanager
def hangups() -> Iterator[threading.Event]:
    """Yields an event that each SIGHUP sets.

    The kernel sends SIGHUP too when a command's terminal goes away, which stops it unless it was started with nohup; then
    it reads its file once more.
    """
    came = threading.Event()
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    had_terminal = _has_terminal()

    def note(*_: object) -> None:
        if ignored or not had_terminal or _has_terminal():
            came.set()
        else:
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGHUP, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGHUP, before)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
