"""How many threads compute: the one place that decides it, so that decoders, encoders and Ray do not take cores twice."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup 2: "QUOTA PERIOD" in microseconds, or "max PERIOD"


def cores() -> int:
    """The cores that this process may use: those it may run on, or fewer where a container's quota says so."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text().split()
        return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):
        return allowed


def of_encoder(cpus: float, asked: int | None) -> int:
    """Threads of one encoder: `asked`, otherwise the CPUs that it reserves (Ray itself would say one)."""
    return asked or max(1, round(cpus))


def of_decoder() -> int:
    """Threads of one decoder replica, which Serve scales in units of this many: `target_ongoing_requests` is 4."""
    return min(4, cores())


def give_way() -> None:
    """Let the machine's other threads go before the calling one, whose work may wait. In the first seconds of an overload all
    that is taken on is decoded at once; the ingress needs its share then, to refuse the rest quickly."""
    if sys.platform == "linux":  # elsewhere it would concern the whole process
        os.nice(5)


def of_planned_encoder() -> int:
    """Threads of an encoder where nobody says: one with 4 answers a lone request soon and keeps them busy under load."""
    return min(4, cores())
