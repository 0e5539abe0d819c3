"""`clipfleet serve` as a process of its own, from its start to nothing left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.deployments.processes import Process, alive, below, of_folder, private_folder

ROOT = Path(__file__).parents[2]
CLIPFLEET = Path(sys.executable).with_name("clipfleet")
START_S = 180  # guards against a hang, on a busy machine
STOP_S = 60
_OUTER = ("RAY_", "CLIPFLEET_", "SERVE_")  # variables of whoever runs the tests that would change a start


@dataclass(frozen=True)
class Service:
    """A running service and what it left behind so far."""

    url: str
    metrics_url: str
    port: int
    ready_line: str
    command: subprocess.Popen[str]
    folder: Path  # its TMPDIR

    def processes(self) -> list[Process]:
        """Everything that belongs to this instance, the command included."""
        return of_folder(self.folder)

    def replicas(self, deployment: str) -> list[Process]:
        """The replica processes of a deployment."""
        title = f"ray::ServeReplica:clipfleet:{deployment}"
        return [process for process in self.processes() if process.title.startswith(title)]

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)  # type: ignore[arg-type]

    def metrics(self) -> dict[str, float]:
        """The exported samples, by name and labels as they stand in the text."""
        text = httpx.get(self.metrics_url, timeout=30, trust_env=False).text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry all of `labels`."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for sample, value in self.metrics().items()
            if sample.partition("{")[0] == name and all(label in sample for label in wanted)
        )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the range from which the kernel gives out."""
    found: list[int] = []
    start = 10_000 + (os.getpid() * 37 + time.monotonic_ns()) % 8_000
    for port in range(start, start + 2000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0 and _binds(port):
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def _binds(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a command of its own, whose files and processes `folder` gives away."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(_OUTER)}
    return {**outer, "TMPDIR": str(folder), **more}


@contextmanager
def command(*arguments: str | Path, folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a session of its own, and end it by its own id if it still runs."""
    process = subprocess.Popen(
        [str(argument) for argument in arguments],
        env=environment(folder, **variables),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
        start_new_session=True,
    )
    (folder / "stderr").unlink()  # stays readable through /proc while the process holds it
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
