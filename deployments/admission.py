"""What the ingress takes on at once: items and bytes, before anything is queued."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from clipfleet.errors import Overloaded
from clipfleet.settings import LimitSettings

_WINDOW_S = 5.0
_KNOWN_S = 4.0  # a rate over less may be that of a burst
_STALLED_S = 2.0  # without any change of what is in flight
_SATURATED = 64  # items: with as many in flight all the time, batches are full and the rate is all that there is


class Lane:
    """Items of one kind in flight, and how fast they are finished while there are plenty.

    Without a backlog the rate of answers is that of the questions, and says nothing of what could be done. In its first
    second, and for as long as nothing is finished, the best of the last backlog stands for it, or before the first `guess`
    (items a second).
    """

    def __init__(self, guess: Callable[[], float | None]) -> None:
        self.items = 0
        self._guess = guess
        self._finished: deque[tuple[float, int]] | None = None  # since the backlog began; None without one
        self._sum = 0  # of what is in there, but for the first, from which on time counts
        self._best: float | None = None  # items a second, of this backlog or the last
        self._is_new = True  # whether `_best` is still of the last

    def change(self, items: int, finished: int = 0) -> None:
        """Take on `items`, or, if below 0, let them go, of which `finished` were done."""
        self.items += items
        now = time.monotonic()
        if self.items - items < _SATURATED and self.items < _SATURATED:
            self._finished = None
            return
        if self._finished is None:
            self._is_new = True
        # A replica was gone for so long: what came before says nothing of the rate now.
        if self._finished is None or now - self._finished[-1][0] > _STALLED_S:
            self._finished, self._sum = deque([(now, 0)]), 0
        self._finished.append((now, finished))
        self._sum += finished
        while self._finished[1][0] < now - _WINDOW_S:
            self._finished.popleft()
            self._sum -= self._finished[0][1]
        if now - self._finished[0][0] > _KNOWN_S and (rate := self._rate()):
            self._best = rate if self._is_new else max(rate, self._best or 0)
            self._is_new = False
        if self.items < _SATURATED:
            self._finished = None

    def _rate(self) -> float | None:
        """Items a second of late; None where that is not known yet."""
        assert self._finished is not None
        span = time.monotonic() - self._finished[0][0]
        return self._sum / span if span > 1 and self._sum else None

    def seconds_for(self, items: int) -> float | None:
        """How long `items` more take, after those in flight, at the present rate; None where that is not known."""
        if self._finished is None:
            return None
        rate = self._rate() or self._best or self._guess()
        return (self.items + items) / rate if rate else None


class Admission:
    """Counts what is in flight in one ingress replica, and refuses what would pass a limit.

    Texts and images are counted apart, because a text never waits behind images: neither may a text be refused for them.
    """

    def __init__(self, limits: LimitSettings, guess: Callable[[str], float | None] = lambda lane: None) -> None:
        """`guess` gives the items a second of "images" or "texts" while nothing has been seen of them."""
        self._limits = limits
        self.bytes = 0
        self.lanes = {lane: Lane(partial(guess, lane)) for lane in ("images", "texts")}
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
    def hold_items(
        self, images: int, texts: int, seconds: float, key: str | None = None
    ) -> Iterator[Callable[[str, int], None]]:
        """Hold a request's items for as long as they are worked on; it has `seconds` left, and came with the API key of that
        name. Yields what is to be called with "images" or "texts" and how many of them are done, before all are. Raises
        Overloaded."""
        held = dict(_wanted(images, texts))
        self.check_items(images, texts, seconds, key)
        for what, count in held.items():
            self.lanes[what].change(count)

        def finish(what: str, count: int) -> None:
            held[what] -= count
            self.lanes[what].change(-count, finished=count)

        done = False
        try:
            with self.hold_key(key, images + texts):
                yield finish
            done = True
        finally:
            for what, count in held.items():
                if count:
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
                retry_after=lane.seconds_for(0) or 1,
            )
        if needed is not None and needed > seconds:
            raise Overloaded(
                f"{lane.items:,} {what} are in flight; with these {count:,} they take {needed:.0f} s at the present rate, "
                f"and the request has {seconds:.0f} s left",
                retry_after=needed - seconds,
            )


def _wanted(images: int, texts: int) -> list[tuple[str, int]]:
    return [(what, count) for what, count in (("images", images), ("texts", texts)) if count]
