"""How far the job is, on stderr: a bar on a terminal, otherwise a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

EVERY_S = 5.0


class Progress:
    """Counts images of `total`; shows rate and time left. `shown=False` keeps it silent."""

    def __init__(self, total: int, shown: bool) -> None:
        self.done, self._printed, self._total = 0, 0, total
        self._shown = shown
        self._started = self._last = time.monotonic()
        terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc="Embedding", unit="image", smoothing=0.1) if terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._shown and self.done != self._printed:
            self._print()

    def advance(self, images: int) -> None:
        self.done += images
        if self._bar is not None:
            self._bar.update(images)
        elif self._shown and time.monotonic() - self._last >= EVERY_S:
            self._last = time.monotonic()
            self._print()

    def _print(self) -> None:
        self._printed = self.done
        rate = self.done / max(time.monotonic() - self._started, 1e-9)
        left = tqdm.format_interval((self._total - self.done) / rate)
        print(f"Embedding: {self.done}/{self._total} images, {rate:.1f} images/s, {left} left", file=sys.stderr)
