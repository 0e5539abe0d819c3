"""The decoder's bound of bytes held at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from unittest.mock import MagicMock

import numpy as np
import pytest

from clipfleet.checkpoint import find_checkpoint
from clipfleet.errors import DeadlineExceeded
from clipfleet.fingerprint import preprocessing_of
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


def test_a_larger_image_gets_its_turn_under_load() -> None:
    """Smaller ones, of which there is always one more that fits, wait behind it."""
    budget, enough, started = MemoryBudget(100), threading.Event(), threading.Barrier(4)

    def small() -> None:
        for number in range(10**6):
            if enough.is_set():
                return
            with budget.hold(30):
                if number == 0:
                    started.wait(10)
                time.sleep(0.02)

    threads = [threading.Thread(target=small) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(10)
    try:
        with budget.hold(90, seconds=20):
            pass
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def test_an_image_that_hangs_does_not_stop_those_that_fit_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_PATIENCE_S", 0.2)
    budget = MemoryBudget(100)

    def large() -> None:
        with pytest.raises(DeadlineExceeded), budget.hold(90, seconds=3):
            pass

    with budget.hold(30):
        thread = threading.Thread(target=large)
        thread.start()
        time.sleep(0.1)
        with budget.hold(30, seconds=2):
            pass
        thread.join()


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


def test_pixels_of_another_checkpoint_are_not_made(replica: DecoderReplica) -> None:
    """While `serve deploy` changes a checkpoint, a new decoder may be asked by an ingress whose encoders are the old ones."""
    image, soon = encode(picture("RGB"), "PNG"), time.time() + 60
    tiny = find_checkpoint("tiny").pixels
    own, other = (preprocessing_of(tiny, exif_orientation=heeded) for heeded in (True, False))
    assert len(asyncio.run(replica.decode([image], soon, own))) == 1
    assert asyncio.run(replica.decode([image], soon, other)) == []
    assert asyncio.run(replica.decode_apart([image], soon, other)) == []
