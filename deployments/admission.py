"""What the ingress takes on at once: items and bytes, before anything is queued."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from clipfleet.errors import Overloaded
from clipfleet.settings import LimitSettings

_WINDOW_S = 10.0
_ENOUGH = 16  # items finished: of fewer, such as one beside a list that goes on, no rate is taken
_BUCKET_S = 0.25  # what is finished is counted by so long
_STALLED_S = 5.0  # without any change of what is in flight: longer than a batch takes
_SATURATED = 64  # items: with as many in flight all the time, batches are full and the rate is all that there is
_QUEUED = 0.8  # of a request's time may pass before its turn, since the rate may fall meanwhile


class Lane:
    """Items of one kind in flight, and how fast they are finished while there are plenty.

    Without a backlog the rate of answers is that of the questions, and says nothing of what could be done.
    """

    def __init__(self) -> None:
        self.items = 0
        self._finished: deque[tuple[float, int]] | None = None  # buckets since the backlog began; None without one
        self._changed = 0.0
        self._before: float | None = None  # seconds an item, before the last stall of this backlog

    def change(self, items: int, finished: int = 0) -> None:
        """Take on `items`, or, if below 0, let them go, of which `finished` were done."""
        before, self.items = self.items, self.items + items
        now = time.monotonic()
        if max(before, self.items) < _SATURATED:
            self._finished = self._before = None
            return
        if self._finished is None or now - self._changed > _STALLED_S:
            # A stall, such as a replica's death, says nothing of the rate before or after it.
            self._before = self._seconds_an_item(self._changed)
            self._finished = deque([(now, 0)])
        elif now - self._finished[-1][0] >= _BUCKET_S:
            self._finished.append((now, 0))
        began, count = self._finished[-1]
        self._finished[-1] = began, count + finished
        self._changed = now
        while self._finished[0][0] < now - _WINDOW_S and self._count() - self._finished[0][1] >= _ENOUGH:
            self._finished.popleft()
        if self.items < _SATURATED:
            self._finished = self._before = None

    def _count(self) -> int:
        return sum(count for _, count in self._finished or ())

    def seconds_for(self, items: int) -> float | None:
        """How long `items` more take, after those in flight, at the present rate; None where that is not known."""
        seconds = self._seconds_an_item(time.monotonic())
        return None if seconds is None else (self.items + items) * seconds

    def _seconds_an_item(self, now: float) -> float | None:
        """The inverse of the rate. Answers come by batches, so the rate since just before one is too high: of the rates since
        different times, which reach back at least half of what is known, the lowest counts.
        """
        if self._finished is None:
            return None
        finished, seconds = 0, 0.0
        known = now - self._finished[0][0]
        for began, count in reversed(self._finished):
            if finished >= _ENOUGH and now - began >= max(1.0, known / 2):
                seconds = max(seconds, (now - began) / finished)
            finished += count
        return seconds or self._before


class Admission:
    """Counts what is in flight in one ingress replica, and refuses what would pass a limit.

    Texts and images are counted apart, because a text never waits behind images: neither may a text be refused for them.
    """

    def __init__(self, limits: LimitSettings) -> None:
        self._limits = limits
        self.bytes = 0
        self.lanes = {"images": Lane(), "texts": Lane()}
        self._by_key: Counter[str] = Counter()  # items in flight of each API key
        self._bytes_by_key: Counter[str] = Counter()

    def items(self) -> int:
        """Images and texts in flight."""
        return sum(lane.items for lane in self.lanes.values())

    def check_bytes(self, size: int, own: int = 0, key: str | None = None) -> None:
        """Raise Overloaded if `size` more bytes of a request that holds `own` would pass the limit; alone it never does.

        Where the items of a key are limited, its bytes are as well: to half of all.
        """
        if self.bytes > own and self.bytes + size > self._limits.inflight_bytes:
            raise Overloaded(
                f"{self.bytes:,} bytes of requests are in flight; the limit is {self._limits.inflight_bytes:,}",
                retry_after=1,
            )

        half = self._limits.inflight_bytes // 2
        if key is not None and self._limits.inflight_items_per_key is not None:
            held = self._bytes_by_key[key]
            if held > own and held + size > half:
                raise Overloaded(
                    f"{held:,} bytes of this API key's requests are in flight; the limit of one key is {half:,}",
                    retry_after=1,
                )

    @contextmanager
    def hold_bytes(self, size: int, own: int = 0, key: str | None = None) -> Iterator[None]:
        """Hold bytes of a body, which has `own` already, until its request is answered. Raises Overloaded."""
        self.check_bytes(size, own, key)
        self.bytes += size
        if key is not None:
            self._bytes_by_key[key] += size
        try:
            yield
        finally:
            self.bytes -= size
            if key is not None:
                self._bytes_by_key[key] -= size

    @contextmanager
    def hold_key(self, key: str | None, count: int) -> Iterator[None]:
        """Hold items of an API key, while their images are fetched or they are worked on. Raises Overloaded."""
        self.check_key(key, count)
        if key is not None:
            self._by_key[key] += count
        try:
            yield
        finally:
            if key is not None:
                self._by_key[key] -= count

    @contextmanager
    def hold_items(self, images: int, texts: int, seconds: float, key: str | None = None) -> Iterator[None]:
        """Hold a request's items for as long as they are worked on; it has `seconds` left, and came with the API key of that
        name. Raises Overloaded."""
        wanted = _wanted(images, texts)
        self.check_items(images, texts, seconds, key)
        for what, count in wanted:
            self.lanes[what].change(count)
        done = False
        try:
            with self.hold_key(key, images + texts):
                yield
            done = True
        finally:
            for what, count in wanted:
                self.lanes[what].change(-count, finished=count if done else 0)

    def check_items(self, images: int, texts: int, seconds: float, key: str | None = None) -> None:
        """Raise Overloaded where hold_items would: for a request of at least so many items, before its body is read."""
        self.check_key(key, images + texts)
        for what, count in _wanted(images, texts):
            self._check(what, count, seconds)

    def check_key(self, key: str | None, count: int) -> None:
        """Raise Overloaded if an API key would have too many items in flight."""
        most = self._limits.inflight_items_per_key
        if key is None or most is None:
            return
        held = self._by_key[key]
        if held and held + count > most:  # alone a request always goes, as with the other limits
            raise Overloaded(
                f"{held:,} items of this API key are in flight; the limit of one key is {most:,}", retry_after=1
            )

    def _check(self, what: str, count: int, seconds: float) -> None:
        lane = self.lanes[what]
        needed = lane.seconds_for(count)
        if lane.items and lane.items + count > self._limits.inflight_items:
            raise Overloaded(
                f"{lane.items:,} {what} are in flight; the limit is {self._limits.inflight_items:,}",
                retry_after=min(lane.seconds_for(0) or 1, seconds),
            )
        if needed is not None and needed > _QUEUED * seconds:
            raise Overloaded(
                f"{lane.items:,} {what} are in flight; with these {count:,} they take {needed:.0f} s at the present rate, "
                f"and the request has {seconds:.0f} s left, of which {_QUEUED:.0%} may be planned",
                retry_after=min(needed - _QUEUED * seconds, seconds),
            )


def _wanted(images: int, texts: int) -> list[tuple[str, int]]:
    return [(what, count) for what, count in (("images", images), ("texts", texts)) if count]
