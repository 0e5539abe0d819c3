"""What a replica keeps of what it needs no longer: freed blocks, cancelled requests, damaged images."""

from __future__ import annotations

import asyncio
import gc
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from starlette.types import Receive, Scope, Send

from clipfleet.keys import KeyRing
from clipfleet.settings import ServiceSettings
from deployments import decoder, memory
from deployments.gate import Gate
from tests.pictures import encode, picture

_RESIDENT = """
import time
from pathlib import Path

import numpy as np

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

before = resident()
"""
# Freeing the first, larger array makes glibc take arrays below its size from the heap, where the small blocks between them
# keep the heap from shrinking. Prints the MiB still held after all arrays are freed.
_CHURN = """
large = np.ones(2**21)
del large
arrays, between = [], []
for _ in range(200):
    arrays.append(np.ones(2**17))
    between.append(bytearray(40_000))
del arrays
"""
# A small block in a thousand stays, and keeps the heap from shrinking.
_SMALL = """
small, kept = [], []
for number in range(400_000):
    (kept if number % 1000 == 0 else small).append(b"%0999d" % number)
del small
time.sleep(1)
"""


def _held(first: str, then: str = _CHURN) -> float:
    root = Path(__file__).parents[2]
    code = f"{first}\n{_RESIDENT}\n{then}\nprint(resident() - before)"
    return float(subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this limit")
def test_large_blocks_are_returned_at_once() -> None:
    assert _held("") > 80, "this test shows nothing: the C library already returns them"
    assert _held("from deployments import memory; memory.return_freed()") < 30


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps them so")
def test_pages_of_small_blocks_are_returned_in_time() -> None:
    start = "from deployments import memory; memory._TRIM_EVERY_S = {}; memory.return_freed()"
    assert _held(start.format(60), _SMALL) > 150, "this test shows nothing: the C library already returns them"
    assert _held(start.format(0.1), _SMALL) < 50


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Python collects when it is told to, and only then."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Body:
    """What a request holds."""


def test_what_a_client_that_left_had_sent_is_soon_let_go(monkeypatch: pytest.MonkeyPatch, no_collector: None) -> None:
    monkeypatch.setattr(memory, "_SOON_S", 0.05)
    monkeypatch.setattr(memory, "_soon", None)
    held: list[weakref.ref[Body]] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        body = Body()
        held.append(weakref.ref(body))
        circle: list[object] = [body]
        circle.append(circle)  # as a task, its exception and its frames
        await asyncio.sleep(60)

    async def leave(gate: Gate) -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "query_string": b"", "headers": []}
        requests = [asyncio.create_task(gate(dict(scope), None, None)) for _ in range(3)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        for request in requests:
            request.cancel()
        for request in requests:
            with suppress(asyncio.CancelledError):
                await request
        del request, requests
        assert len(held) == 3 and all(body() is not None for body in held), "this test shows nothing"
        await asyncio.sleep(0.3)
        assert all(body() is None for body in held)

    for _ in range(2):  # also when it has been done before
        held.clear()
        asyncio.run(leave(Gate(work, keys=KeyRing((), None), fingerprint=lambda: None)))


def test_a_damaged_image_is_let_go_with_its_answer(monkeypatch: pytest.MonkeyPatch, no_collector: None) -> None:
    def open_image(data: bytes, limits: object) -> object:
        image = opened(data, limits)
        seen.append(weakref.ref(image))
        return image

    opened, seen = decoder.open_image, []
    monkeypatch.setattr(decoder, "open_image", open_image)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    of_serve = ("check_own_scaling", "decode_seconds", "logs", "memory", "tracing")  # for a replica that it has started
    for name in of_serve:
        monkeypatch.setattr(decoder, name, MagicMock())
    replica = decoder.DecoderReplica(ServiceSettings(model="tiny"))
    whole = [encode(picture("RGB", 200, 150), kind) for kind in ("GIF", "PNG", "JPEG", "WEBP", "BMP", "TIFF")]
    answers = asyncio.run(replica.decode([data[: len(data) // 2] for data in whole] + whole, time.time() + 60))
    assert [isinstance(answer, np.ndarray) for answer in answers].count(False) >= 4
    assert all(image() is None for image in seen), "an error holds its frames, and these the image"
    assert len(seen) >= 10
