"""What the ingress takes on at once: items and bytes, before anything is queued."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from clipfleet.errors import Overloaded
from clipfleet.settings import LimitSettings

_WINDOW_S = 5.0


class Rate:
    """Items finished a second, over the last seconds in which there was work."""

    def __init__(self) -> None:
        self._done: deque[tuple[float, int]] = deque()

    def add(self, items: int) -> None:
        """Count items that finished just now."""
        now = time.monotonic()
        self._done.append((now, items))
        while self._done and self._done[0][0] < now - _WINDOW_S:
            self._done.popleft()

    def seconds_for(self, items: int) -> float | None:
        """How long `items` will take at this rate; None where too little is known."""
        if len(self._done) < 8:
            return None
        span = time.monotonic() - self._done[0][0]
        finished = sum(count for _, count in self._done)
        return items * span / finished if span > 1 else None


class Admission:
    """Counts what is in flight in one ingress replica, and refuses what would pass a limit."""

    def __init__(self, limits: LimitSettings) -> None:
        self._limits = limits
        self.items = 0
        self.bytes = 0
        self._rate = Rate()

    @contextmanager
    def hold_bytes(self, size: int) -> Iterator[None]:
        """Hold a body's bytes until its request is answered. Raises Overloaded."""
        if self.bytes and self.bytes + size > self._limits.inflight_bytes:
            raise Overloaded(
                f"{self.bytes:,} bytes of requests are in flight; the limit is {self._limits.inflight_bytes:,}",
                retry_after=1,
            )
        self.bytes += size
        try:
            yield
        finally:
            self.bytes -= size

    @contextmanager
    def hold_items(self, count: int, seconds: float) -> Iterator[None]:
        """Hold a request's items for as long as they are worked on; it has `seconds` left. Raises Overloaded."""
        if self.items and self.items + count > self._limits.inflight_items:
            raise Overloaded(
                f"{self.items:,} items are in flight; the limit is {self._limits.inflight_items:,}",
                retry_after=self._rate.seconds_for(self.items) or 1,
            )
        needed = self._rate.seconds_for(self.items + count) if self.items else None
        if needed is not None and needed > seconds:
            raise Overloaded(
                f"{self.items:,} items are in flight and take {needed:.0f} s at the present rate; "
                f"the request has {seconds:.0f} s left",
                retry_after=needed - seconds,
            )
        self.items += count
        try:
            yield
            self._rate.add(count)
        finally:
            self.items -= count
