"""A `clipfleet serve` of this checkout for as long as a block runs, its replicas by name, and nothing left afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from benchmarks.processes import below

ROOT = Path(__file__).parents[1]
START_S = 300
DEMO = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())


def config(replicas: dict[str, int], **arguments: Any) -> dict[str, Any]:
    """configs/demo.yaml with so many replicas of each deployment, and other `args`. They reserve little, to find room."""
    changed = deepcopy(DEMO)
    application = changed["applications"][0]
    application["args"] |= {"cpus_per_replica": 0.1, **arguments}
    for deployment in application["deployments"]:
        deployment.pop("autoscaling_config", None)
        deployment["num_replicas"] = replicas.get(deployment["name"], 1)
        if "ray_actor_options" in deployment:
            deployment["ray_actor_options"] = {"num_cpus": 0.05}
    return changed


def is_ready(port: int) -> bool:
    """What /readyz says."""
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
        return answer.status == 200
    return False


@dataclass(frozen=True)
class Served:
    """A running service."""

    port: int
    pid: int
    file: Path  # the config
    log: IO[bytes]  # what it printed

    def printed(self) -> str:
        # The service writes at the position that this descriptor has too.
        return os.pread(self.log.fileno(), 2**24, 0).decode(errors="replace")

    def reload(self, settings: dict[str, Any], seconds: float = 180) -> str:
        """Write another config, have it read by SIGHUP, and wait until the service says what came of it."""
        before = self.printed()
        self.file.write_text(yaml.safe_dump(settings))
        os.kill(self.pid, signal.SIGHUP)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            said = self.printed()[len(before) :]
            if "clipfleet ready:" in said or "nothing was changed" in said:
                return said
            time.sleep(0.2)
        raise TimeoutError(f"no word of a change within {seconds:.0f} s")

    def replicas(self, deployment: str) -> list[int]:
        """The process ids of a deployment's replicas."""
        return [pid for pid, name in below(self.pid).items() if name == deployment]  # of both applications in a change

    def processes(self) -> dict[int, str]:
        return below(self.pid)

    def ready(self) -> bool:
        """What /readyz says."""
        return is_ready(self.port)

    def until_ready(self, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not self.ready():
            if time.monotonic() > end:
                raise TimeoutError(f"/readyz was not 200 within {seconds:.0f} s")
            time.sleep(0.2)


@contextmanager
def serve(settings: dict[str, Any], model: str | Path | None, port: int = 8470) -> Iterator[Served]:
    """Serve `model`, or the one that the config names, under a config file's content. Raises OSError where another one
    listens: it would answer instead."""
    socket.create_server(("127.0.0.1", port)).close()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "clipfleet.cli", "serve", file, "--port", port, "--metrics-port", port + 1]
        command += ["--model", model] if model else []
        process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=log, stderr=log)
        served = Served(port, process.pid, file, log)
        try:
            end = time.monotonic() + START_S
            while "clipfleet ready:" not in served.printed():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the service did not start:\n{served.printed()[-3000:]}")
                time.sleep(0.2)
            yield served
        finally:
            left = served.processes()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                end = time.monotonic() + 30  # its guardian ends the others
                while any(Path("/proc", str(pid)).exists() for pid in left) and time.monotonic() < end:
                    time.sleep(0.2)
                raise
