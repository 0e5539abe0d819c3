"""The memory of a replica: how often Python collects, and what the C library keeps of freed blocks."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGE = 256 * 2**10


def return_large_blocks() -> None:
    """Give each freed block of 256 KiB or more back to the system at once.

    glibc raises that limit, up to 32 MiB, whenever a larger block is freed, and holes between blocks of changing sizes stay, as
    between OpenVINO's activations for batches of every size or between images on their way to a decoder: under `make soak` an
    encoder grew by 144 MB an hour, a decoder by 176. What a decoder needs for each photograph it keeps itself
    (clipfleet/pixel_memory.py).
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 * _LARGE)  # setting one fixes the other at 128 KiB, which costs calls


def collect_rarely() -> None:
    """Collect now, leave what a replica holds for life out of later collections, and collect less often.

    A request makes hundreds of objects, and all but cycles are freed without the collector, which took 4% of the ingress' time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
