"""`clipfleet serve` as a process of its own, from its start to nothing left."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from tests.deployments.processes import Process, alive, below, end_all, of_folder, private_folder, until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CERTIFICATE = ROOT / "tests" / "data" / "localhost.pem"  # its own issuer, for localhost and 127.0.0.1
START_S = 180  # these two only guard against a hang, on a busy machine
STOP_S = 90
_OUTER = ("RAY_", "CLIPFLEET_", "SERVE_")  # variables of whoever runs the tests that would change a start


class Command:
    """A command in a session of its own, whose files and processes `folder` gives away."""

    def __init__(self, *arguments: str | Path, folder: Path, cwd: Path = ROOT, **variables: str) -> None:
        outer = {name: value for name, value in os.environ.items() if not name.startswith(_OUTER)}
        self.folder = folder
        self._process = subprocess.Popen(
            [str(argument) for argument in arguments],
            env={**outer, "TMPDIR": str(folder), **variables},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._said: dict[str, list[str]] = {"out": [], "err": []}
        self._readers = [
            threading.Thread(target=self._read, args=(stream, self._said[name]), daemon=True)
            for name, stream in (("out", self._process.stdout), ("err", self._process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line)

    @property
    def out(self) -> str:
        return "".join(self._said["out"])

    @property
    def err(self) -> str:
        return "".join(self._said["err"])

    def wait_for(self, text: str, seconds: float = START_S) -> None:
        """Wait until a line of stdout or stderr holds `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.out and text not in self.err:
            assert not self.ended, f"ended with {self._process.returncode} before {text!r}:\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"no {text!r} in {seconds} s:\n{self.out}\n{self.err}"
            time.sleep(0.05)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def below(self) -> list[Process]:
        return below(self.pid)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """The exit status. What the command said is complete then."""
        status = self._process.wait(seconds)
        for reader in self._readers:
            reader.join(seconds)  # until every holder of the pipes is gone
        return status

    def close(self) -> None:
        """End it by its own id if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        end_all(self.folder)
        for reader in self._readers:
            reader.join()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def running(*arguments: str | Path, folder: Path, **variables: Any) -> Iterator[Command]:
    """A command that is ended when the block is left, together with what it started."""
    command = Command(*arguments, folder=folder, **variables)
    try:
        yield command
    finally:
        command.close()


def sum_of(page: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples in `page` that carry all of `labels`; 0.0 where there is none yet."""
    samples = [line.rsplit(" ", 1) for line in page.splitlines() if line.partition("{")[0] == name]
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(float(value) for sample, value in samples if all(label in sample for label in wanted))


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    metrics_url: str
    port: int
    command: Command
    folder: Path  # its TMPDIR

    def processes(self) -> list[Process]:
        """Everything that belongs to this instance, the command included."""
        return of_folder(self.folder)

    def replicas(self, deployment: str) -> list[Process]:
        """The replica processes of a deployment."""
        title = f"ray::ServeReplica:clipfleet:{deployment}"
        return [process for process in self.processes() if process.title.startswith(title)]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=trusted(), **options)

    def metrics(self) -> str:
        """What the metrics port says now."""
        return httpx.get(f"{self.metrics_url}/metrics", timeout=30, trust_env=False).text

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples now."""
        return sum_of(self.metrics(), name, **labels)


@cache
def trusted() -> ssl.SSLContext:
    """What a client needs to trust CERTIFICATE."""
    return ssl.create_default_context(cafile=CERTIFICATE)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the ranges of the kernel and of clipfleet itself."""
    start = 10_000 + (os.getpid() * 37 + time.monotonic_ns() // 1000) % 8_000
    ports = iter(range(start, start + 2000))
    return [next(port for port in ports if _binds(port)) for _ in range(count)]


def _binds(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@contextmanager
def serving(*arguments: str | Path, stop: signal.Signals = signal.SIGTERM, **variables: str) -> Iterator[Service]:
    """Run `clipfleet serve ARGUMENTS` on free ports until the block ends, then stop it by a signal.

    Afterwards it must have ended with status 0 (killed, with that signal), and left no process and no file behind. With
    `--tls` and CERTIFICATE among the arguments it speaks HTTPS.
    """
    with private_folder() as folder:
        port, metrics_port = free_ports(2)
        ports = ("--port", str(port), "--metrics-port", str(metrics_port))
        with running(BIN / "clipfleet", "serve", *arguments, *ports, folder=folder, **variables) as process:
            scheme = "https" if "--tls" in arguments else "http"
            url, metrics_url = f"{scheme}://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}"
            process.wait_for("clipfleet ready: ")
            yield Service(url, metrics_url, port, process, folder)
            known = process.below()
            if not process.ended:
                process.send(stop)
            if stop is signal.SIGKILL:  # its guardian ends the rest
                until(lambda: not of_folder(folder), 30, "an end of all its processes")
                until(lambda: not any(path.is_file() for path in folder.rglob("*")), 30, "an end of all its files")
            assert process.wait(STOP_S) == (-stop if stop is signal.SIGKILL else 0), process.err
            assert not alive(known)
