"""Ctrl-C and SIGTERM: the first one lets the job finish what is in flight, the second one stops it at once.

What is in flight is told by a file of the run's scratch folder: a decode task that sees it begins no more images,
hands over those of an output file that it has, and ends. So the stream runs dry by itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRAIN_S = 30.0  # a batch system usually kills a minute or so after its SIGTERM


class Stop:
    """What the signals have asked for so far. Outside of `draining`, a signal raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._flag: Path | None = None
        self._timer: threading.Timer | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal has come while the job streamed."""
        return self._timer is not None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Take both signals. Without effect outside of the main thread, which alone gets them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def draining(self, flag: Path) -> Iterator[None]:
        """In the block, the first signal makes the file `flag` and has DRAIN_S seconds of effect; a second one raises."""
        self._flag = flag
        try:
            yield
        finally:
            self._flag = None
            if self._timer is not None:
                self._timer.cancel()

    def _handle(self, *_: object) -> None:
        if self._flag is None or self.asked:
            raise KeyboardInterrupt
        # The second signal, unless the block ends before.
        self._timer = threading.Timer(DRAIN_S, os.kill, (os.getpid(), signal.SIGTERM))
        self._timer.daemon = True
        self._timer.start()
        try:
            self._flag.touch()
        except OSError:  # DEST is full or gone: nothing in flight could be written either
            raise KeyboardInterrupt from None
        # Not print(): the signal may have come in the midst of one.
        line = f"clipfleet: stopping: finishing what is in flight, {DRAIN_S:.0f} s at most; once more stops at once\n"
        os.write(sys.stderr.fileno(), line.encode())
