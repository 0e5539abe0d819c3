"""What this machine carries without a model, through the whole service, to plan with."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from clipfleet.config_file import APPLICATION
from clipfleet.errors import SetupError
from clipfleet.load import image_request, run_load
from clipfleet.threads import cores
from deployments.local_ray import local_service
from deployments.serve import wait_until_ready

HOLLOW = "deployments.hollow:build"


class Transport(NamedTuple):
    """Requests a second, and what one took of the cores, its client's part included."""

    rate: float
    core_s: float


def measure_transport(*, clients: int = 16, body_bytes: int = 100_000, requests: int = 1000) -> Transport:
    """Serve the graph without a model and load it with bodies of that size. The load comes from the same cores.

    Call it in the main thread before ray is imported. Raises SetupError.
    """
    config: dict[str, Any] = {
        "applications": [{"name": APPLICATION, "route_prefix": "/", "import_path": HOLLOW, "args": {"model": "tiny"}}]
    }
    port, metrics_port = _free_ports(2)
    with _alone(), local_service(config, port=port, metrics_port=metrics_port) as service:
        wait_until_ready(service, "")
        request = image_request([bytes(body_bytes)])
        url = f"http://127.0.0.1:{port}"
        run_load(url, itertools.repeat(request, 200), clients)
        before = _busy_s()
        load = run_load(url, itertools.repeat(request, requests), clients)
        busy = min(_busy_s() - before, cores() * load.seconds)  # a container is told of the whole machine
    if load.failures:
        raise SetupError(f"transport could not be measured: {load}")
    return Transport(load.rate, busy / load.items)


def _busy_s() -> float:
    """Seconds that all cores of this machine together have worked."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _alone() -> Iterator[None]:
    """Without what the environment says of services that are in use: it is on no account one of those that is measured."""
    kept = {
        name: os.environ.pop(name)
        for name in ("RAY_ADDRESS", "CLIPFLEET_API_KEYS", "CLIPFLEET_API_KEYS_FILE")
        if name in os.environ
    }
    try:
        yield
    finally:
        os.environ.update(kept)


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
