"""Full batches under load and no waiting without it: one list of waiting items, one worker, one model.

`@serve.batch` forms its next batch while the model is still busy and then queues it, so under load its
batches stay small. Here items wait in one list, and whenever the model falls free the worker takes as many
as a batch may hold.
"""

from __future__ import annotations

import asyncio
import faulthandler
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from loguru import logger

from clipfleet.errors import ClipfleetError, DeadlineExceeded, Unavailable
from clipfleet.settings import BatchSettings
from deployments import tracing

if TYPE_CHECKING:
    from opentelemetry.context import Context


class Observer(Protocol):
    """Told about every batch: its size, how long each item waited and how long the model took, in seconds."""

    def __call__(self, size: int, waits: Sequence[float], forward: float) -> None: ...


@dataclass(eq=False)
class _Call:
    """One caller's items, and the outcomes as they come in."""

    items: Sequence[Any]
    deadline: float  # time.time()
    done: asyncio.Future[list[Any]]
    quiet: bool
    trace: Context | None
    arrived: float = field(default_factory=time.monotonic)
    taken: int = 0
    outcomes: dict[int, Any] = field(default_factory=dict)

    def settle(self, index: int, outcome: Any) -> None:
        self.outcomes[index] = outcome
        if len(self.outcomes) == len(self.items) and not self.done.done():
            self.done.set_result([self.outcomes[i] for i in range(len(self.items))])


class Batcher:
    """Joins the items of concurrent callers into batches for `forward`, which runs in a thread of its own.

    `forward` maps a list of items to as many outcomes. If it raises, each item of the batch gets the error. If it takes
    longer than `patience_s` seconds it hangs, and this process is ended: nothing else gets a thread out of a device driver.
    """

    def __init__(
        self,
        forward: Callable[[list[Any]], Sequence[Any]],
        settings: BatchSettings,
        observe: Observer,
        patience_s: float,
    ) -> None:
        self._forward = forward
        self._patience_s = patience_s
        self._observe = observe
        self.settings = settings
        self._waiting: deque[_Call] = deque()
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task[None] | None = None
        self.last_success: float | None = None  # time.monotonic() of the last forward pass that returned

    async def submit(self, items: Sequence[Any], deadline: float, *, quiet: bool = False) -> list[Any]:
        """Wait for what enqueue promises."""
        return await self.enqueue(items, deadline, quiet=quiet)

    def enqueue(
        self, items: Sequence[Any], deadline: float, *, quiet: bool = False, trace: Context | None = None
    ) -> asyncio.Future[list[Any]]:
        """One outcome an item, in order: what `forward` made of it, or a ClipfleetError. Cancelling drops what still waits.

        `deadline` is wall-clock time (time.time()), because it comes from another process. Items still waiting
        then are dropped. `quiet` keeps a call out of the observer's figures (a probe is no traffic); `trace` is what its spans
        belong to.
        """
        done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if not items:
            done.set_result([])
            return done
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        self._waiting.append(_Call(items, deadline, done, quiet, trace))
        self._arrival.set()
        return done

    async def _work(self) -> None:
        while True:
            await self._arrival.wait()
            await self._wait_for_company()
            batch = self._take()
            if batch:
                await self._run(batch)
            if not self._waiting:
                self._arrival.clear()

    async def _wait_for_company(self) -> None:
        patience = self.settings.batch_wait_timeout_s
        until = time.monotonic() + patience
        while patience and self._count() < self.settings.max_batch_size and time.monotonic() < until:
            await asyncio.sleep(min(0.001, patience))

    def _count(self) -> int:
        return sum(len(call.items) - call.taken for call in self._waiting)

    def _take(self) -> list[tuple[_Call, int]]:
        """Take up to a batch of items, the same share from each caller, so that a long list does not starve a lone query."""
        self._drop_expired()
        room = self.settings.max_batch_size
        batch: list[tuple[_Call, int]] = []
        while room > 0 and self._waiting:
            share = max(1, room // len(self._waiting))
            for call in list(self._waiting)[:room]:
                count = min(share, room, len(call.items) - call.taken)
                batch += [(call, call.taken + offset) for offset in range(count)]
                call.taken += count
                room -= count
            self._waiting = deque(call for call in self._waiting if call.taken < len(call.items))
        return batch

    def _drop_expired(self) -> None:
        now = time.time()
        for call in self._waiting:
            if call.done.done():  # its caller went away
                call.taken = len(call.items)
            elif call.deadline <= now:
                for index in range(call.taken, len(call.items)):
                    call.settle(index, DeadlineExceeded("the deadline passed while the item waited for the model"))
                call.taken = len(call.items)
        self._waiting = deque(call for call in self._waiting if call.taken < len(call.items))

    async def _run(self, batch: list[tuple[_Call, int]]) -> None:
        started = time.monotonic()
        items = [call.items[index] for call, index in batch]
        outcomes: Sequence[Any]
        try:
            outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self._watched, items)
            self.last_success = time.monotonic()
        except ClipfleetError as error:
            outcomes = [error] * len(batch)
        except Exception as error:
            outcomes = [model_failure(error)] * len(batch)
        ended = time.monotonic()
        counted = [started - call.arrived for call, _ in batch if not call.quiet]
        if counted:
            self._observe(len(counted), counted, ended - started)
        for (call, index), outcome in zip(batch, outcomes, strict=True):
            call.settle(index, outcome)
        for call in {id(call): call for call, _ in batch}.values():
            tracing.record("wait for the model", call.trace, call.arrived, started)
            tracing.record("forward pass", call.trace, started, ended, batch=len(batch))

    def _watched(self, items: list[Any]) -> Sequence[Any]:
        # Its watching thread needs neither the event loop nor the interpreter's lock, and says on stderr where it hung.
        faulthandler.dump_traceback_later(self._patience_s, exit=True, file=2)
        try:
            return self._forward(items)
        finally:
            faulthandler.cancel_dump_traceback_later()


def model_failure(error: Exception) -> ClipfleetError:
    """What callers of a failed batch get: the exception's text stays in the replica's log."""
    logger.opt(exception=error).error("the forward pass failed")
    return Unavailable("the model failed on this batch; try again", retry_after=1)
