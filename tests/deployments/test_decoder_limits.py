"""The decoder's bound of bytes held at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from unittest.mock import MagicMock

import numpy as np
import pytest

from clipfleet.errors import DeadlineExceeded
from clipfleet.settings import ServiceSettings
from deployments import decoder
from deployments.decoder import DecoderReplica, MemoryBudget
from tests.pictures import encode, picture


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> DecoderReplica:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    of_serve = ("check_own_scaling", "decode_seconds", "logs", "memory", "tracing")  # for a replica that it has started
    for name in of_serve:
        monkeypatch.setattr(decoder, name, MagicMock())
    return DecoderReplica(ServiceSettings(model="tiny"))


def test_bytes_wait_until_they_fit() -> None:
    budget = MemoryBudget(100)
    entered = threading.Event()

    def second() -> None:
        with budget.hold(60):
            entered.set()

    thread = threading.Thread(target=second)
    with budget.hold(60):
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()


def test_a_larger_image_gets_its_turn_alone() -> None:
    budget = MemoryBudget(100)
    with budget.hold(5000):
        pass
    with pytest.raises(ValueError, match="broken"), budget.hold(100):
        raise ValueError("broken")
    with budget.hold(100):  # was given back
        pass


def test_an_image_that_waits_past_its_deadline_is_answered_so(replica: DecoderReplica) -> None:
    released = threading.Event()

    def hold() -> None:
        with replica._budget.hold(replica._budget.limit):
            held.set()
            released.wait(10)  # reached only if decoding waits beyond its deadline

    held, thread = threading.Event(), threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    images = [encode(picture("RGB"), "PNG"), b"no image"]
    outcomes = asyncio.run(replica.decode(images, time.time() + 0.3))
    released.set()
    thread.join()
    assert [getattr(outcome, "code", "pixels") for outcome in outcomes] == [
        "deadline_exceeded",
        "image_format_unsupported",
    ]
    assert isinstance(outcomes[0], DeadlineExceeded) and outcomes[0].__traceback__ is None
    assert isinstance(asyncio.run(replica.decode(images, time.time() + 60))[0], np.ndarray)


def test_images_decoded_apart_leave_half_of_the_memory(
    replica: DecoderReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, held = threading.Barrier(2), []

    class Child:
        def __init__(self, *_: object) -> None:
            self.close: Callable[[], None] = lambda: None

        def decode_into(self, *_: object, **__: object) -> None:
            together.wait(10)
            held.append(replica._budget._held)
            together.wait(10)

    async def both() -> None:
        await asyncio.gather(*(replica.decode_apart([b"suspect"], time.time() + 60) for _ in range(2)))

    monkeypatch.setattr(decoder, "DecodeProcess", Child)
    asyncio.run(both())
    assert held[0] == held[1] <= replica._budget.limit // 2
