"""The list of waiting items: full batches while the model is busy, no waiting while it is free."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from clipfleet.errors import DeadlineExceeded, ImageCorrupt, Unavailable
from clipfleet.settings import BatchSettings
from deployments.batching import Batcher
from tests.deployments.service import ROOT

LATER = time.time() + 3600


class Model:
    """Answers each item with itself, and stands still while `busy` is held."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.busy = threading.Lock()
        self.error: Exception | None = None

    def __call__(self, items: list[Any]) -> list[Any]:
        self.batches.append(items)
        with self.busy:
            if self.error:
                raise self.error
            return [("done", item) for item in items]


class Observed:
    def __init__(self) -> None:
        self.calls: list[tuple[int, list[float], float]] = []

    def __call__(self, size: int, waits: Sequence[float], forward: float) -> None:
        self.calls.append((size, list(waits), forward))


def batcher(model: Model, largest: int = 4, observed: Observed | None = None) -> Batcher:
    return Batcher(model, BatchSettings(max_batch_size=largest), observed or Observed(), patience_s=60)


async def started(model: Model, batches: int) -> None:
    """Wait until the model has been given so many batches."""
    while len(model.batches) < batches:
        await asyncio.sleep(0.001)


def test_lone_items_go_at_once_and_alone() -> None:
    async def scenario() -> None:
        model, observed = Model(), Observed()
        batches = batcher(model, observed=observed)
        for number in range(3):
            assert await batches.submit([number], LATER) == [("done", number)]
        assert model.batches == [[0], [1], [2]]
        assert [size for size, _, _ in observed.calls] == [1, 1, 1]

    asyncio.run(scenario())


def test_what_arrives_while_the_model_is_busy_shares_the_next_batch() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model, largest=4)
        with model.busy:
            calls = [asyncio.create_task(batches.submit([0], LATER))]
            await started(model, 1)
            calls += [asyncio.create_task(batches.submit([number], LATER)) for number in range(1, 8)]
            await asyncio.sleep(0.01)
        assert await asyncio.gather(*calls) == [[("done", number)] for number in range(8)]
        assert model.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]

    asyncio.run(scenario())


def test_a_long_list_leaves_room_for_a_lone_query() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model, largest=4)
        with model.busy:
            first = asyncio.create_task(batches.submit(["first"], LATER))
            await started(model, 1)
            long = asyncio.create_task(batches.submit(list(range(10)), LATER))
            lone = asyncio.create_task(batches.submit(["lone"], LATER))
            await asyncio.sleep(0.01)
        assert await long == [("done", number) for number in range(10)]
        await asyncio.gather(first, lone)
        assert "lone" in model.batches[1]

    asyncio.run(scenario())


def test_a_failed_batch_fails_its_own_items_alone() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model)
        model.error = ImageCorrupt("named")
        assert [type(outcome) for outcome in await batches.submit([1, 2], LATER)] == [ImageCorrupt, ImageCorrupt]
        model.error = ValueError("a secret of the model")
        (outcome,) = await batches.submit([3], LATER)
        assert isinstance(outcome, Unavailable) and "secret" not in outcome.message
        model.error = None
        assert await batches.submit([4], LATER) == [("done", 4)]

    asyncio.run(scenario())


def test_what_expired_or_was_given_up_is_not_computed() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model)
        with model.busy:
            first = asyncio.create_task(batches.submit(["first"], LATER))
            await started(model, 1)
            late = asyncio.create_task(batches.submit(["late"], time.time() - 1))
            gone = asyncio.create_task(batches.submit(["gone"], LATER))
            good = asyncio.create_task(batches.submit(["good"], LATER))
            await asyncio.sleep(0.01)
            gone.cancel()
        assert await good == [("done", "good")]
        assert isinstance((await late)[0], DeadlineExceeded)
        await first
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert model.batches == [["first"], ["good"]]

    asyncio.run(scenario())


def test_new_settings_hold_for_the_next_batch() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model, largest=4)
        await batches.submit(list(range(6)), LATER)
        batches.settings = BatchSettings(max_batch_size=2)
        await batches.submit(list(range(4)), LATER)
        batches.settings = BatchSettings(max_batch_size=8, batch_wait_timeout_s=5)
        calls = [batches.submit([number] * 4, LATER) for number in range(2)]  # full before the wait is over
        await asyncio.wait_for(asyncio.gather(*calls), 4)
        assert [len(batch) for batch in model.batches] == [4, 2, 2, 2, 8]

    asyncio.run(scenario())


def test_probes_are_no_traffic() -> None:
    async def scenario() -> None:
        observed = Observed()
        batches = batcher(Model(), observed=observed)
        await batches.submit(["probe"], LATER, quiet=True)
        assert observed.calls == [] and batches.last_success is not None
        assert await batches.submit([], LATER) == []

    asyncio.run(scenario())


def test_a_short_call_does_not_wait_for_a_long_one() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model, largest=4)
        long = batches.enqueue(list(range(40)), LATER)
        short = batches.enqueue(["short"], LATER)
        assert await short == [("done", "short")]
        assert not long.done()
        await long

    asyncio.run(scenario())


def test_what_a_cancelled_call_still_waits_for_is_dropped() -> None:
    async def scenario() -> None:
        model = Model()
        batches = batcher(model, largest=4)
        with model.busy:
            long = batches.enqueue(list(range(40)), LATER)
            await started(model, 1)
            long.cancel()
        assert await batches.submit(["next"], LATER) == [("done", "next")]
        assert sum(map(len, model.batches)) == 5

    asyncio.run(scenario())


HANGING = """
import asyncio, time
from clipfleet.settings import BatchSettings
from deployments.batching import Batcher

def model_that_hangs(items):
    if "hang" in items:
        time.sleep(600)
    return items

async def main():
    batches = Batcher(model_that_hangs, BatchSettings(), lambda *_: None, patience_s=0.5)
    for _ in range(3):
        print(await batches.submit(["well"], time.time() + 60), flush=True)
        await asyncio.sleep(0.4)
    await batches.submit(["hang"], time.time() + 60)

asyncio.run(main())
"""


def test_a_forward_pass_that_hangs_ends_the_process_and_says_where() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == 3 * "['well']\n", done.stderr  # short ones are not counted together
    assert done.returncode == 1
    assert "model_that_hangs" in done.stderr
