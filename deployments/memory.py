"""The memory of a replica: how often Python collects, and what the C library keeps of freed blocks."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
# Smaller ones are used again: a photograph's body is copied from hand to hand, and asyncio reads 256 KiB at once. Mapping each
# copy anew costs requests (docs/performance.md).
_LARGE = 2**20
_TRIM_EVERY_S = 30.0
_SOON_S = 1.0

_soon: asyncio.TimerHandle | None = None


def return_freed() -> None:
    """Give each freed block of 1 MiB or more back to the system at once, and the pages of smaller ones twice a minute.

    glibc raises that limit, up to 32 MiB, whenever a larger block is freed, and holes between blocks of changing sizes stay, as
    between OpenVINO's activations for batches of every size or between images on their way to a decoder: under `make soak` an
    encoder grew by 144 MB an hour, a decoder by 176. What a decoder needs for each photograph it keeps itself
    (clipfleet/pixel_memory.py).
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 * _LARGE)  # setting one fixes the other at 128 KiB, which costs calls
        threading.Thread(target=_trim, args=(libc.malloc_trim,), name="return-freed", daemon=True).start()


def _trim(malloc_trim: Callable[[int], int]) -> None:
    while True:  # 5 to 8 ms of a core each time
        time.sleep(_TRIM_EVERY_S)
        malloc_trim(0)


def collect_rarely() -> None:
    """Collect now, leave what a replica holds for life out of later collections, and collect less often, but then all.

    A request makes hundreds of objects, and all but cycles are freed without the collector, which took 4% of the ingress' time.
    What is in flight during a collection counts as old afterwards, its body with it, and old ones are collected 400 times
    more rarely unless told.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 1, 1)


def collect_soon() -> None:
    """Have Python collect a second from now. For what requests that were cancelled leave, in the event loop that runs.

    Their tasks, frames and messages to other replicas hold each other, and the body, which may be megabytes.
    """
    global _soon
    if _soon is None:
        _soon = asyncio.get_running_loop().call_later(_SOON_S, _collect)


def _collect() -> None:
    global _soon
    _soon = None
    gc.collect()
