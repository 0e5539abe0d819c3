"""The memory of a replica: how often Python collects, and what the C library keeps of freed blocks."""

from __future__ import annotations

import ctypes
import gc
import time
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGE = 256 * 2**10
_EVERY_S = 10.0

_returned = 0.0  # when return_unused last did


def return_large_blocks() -> None:
    """Give each freed block of 256 KiB or more back to the system at once.

    glibc raises that limit, up to 32 MiB, whenever a larger block is freed, and holes between blocks of changing sizes stay, as
    between OpenVINO's activations for batches of every size: under `make soak` an encoder grew by 144 MB an hour.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 * _LARGE)  # setting one fixes the other at 128 KiB, which costs calls


def return_unused() -> None:
    """Give what is free back to the system, every 10 s at most.

    For decoders: after images of tens of megapixels, among small ones on several threads, hundreds of MB stay free in holes.
    return_large_blocks is not for them, whose images would each be made of new pages.
    """
    global _returned
    now = time.monotonic()
    if now - _returned > _EVERY_S:
        _returned = now
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def collect_rarely() -> None:
    """Collect now, leave what a replica holds for life out of later collections, and collect less often.

    A request makes hundreds of objects, and all but cycles are freed without the collector, which took 4% of the ingress' time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
