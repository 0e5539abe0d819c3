"""`serve deploy` under load, on a cluster that `ray start` made: Ray's own way of changing settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from benchmarks.processes import below
from faults.chaos import CLIENTS, pictures, row_of
from faults.report import Row
from faults.served import ROOT, config, is_ready
from faults.traffic import traffic

BIN = Path(sys.executable).parent
PORT = 8480
REPLICAS = {"Ingress": 2, "ImageDecoder": 2, "ImageEncoder": 2, "TextEncoder": 2}


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray of its own ports and folder; yields the environment of commands that use it."""
    gcs, dashboard, agent = PORT + 10, PORT + 11, PORT + 12
    variables = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),
        "PYTHONPATH": str(ROOT),
    }
    command = [
        BIN / "ray", "start", "--head", "--block", "--port", gcs, "--dashboard-port", dashboard, "--num-cpus", 4,
        "--dashboard-agent-listen-port", agent, "--ray-client-server-port", PORT + 13, "--temp-dir", folder,
        "--min-worker-port", 0, "--max-worker-port", 0, "--object-store-memory", 256 * 2**20,
    ]  # fmt: skip
    head = subprocess.Popen(
        [str(part) for part in command], env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield variables | {"RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        left = below(head.pid)
        head.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(60)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()


def _deploy(settings: dict[str, Any], folder: Path, variables: dict[str, str]) -> None:
    settings = {**settings, "http_options": {"host": "127.0.0.1", "port": PORT}}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    end = time.monotonic() + 120
    while subprocess.run([BIN / "serve", "deploy", file], env=variables, cwd=ROOT, capture_output=True).returncode:
        if time.monotonic() > end:  # the dashboard takes a while to listen
            raise TimeoutError("serve deploy failed for two minutes")
        time.sleep(2)


def _status(variables: dict[str, str]) -> str:
    done = subprocess.run([BIN / "serve", "status"], env=variables, cwd=ROOT, capture_output=True, text=True)
    return (yaml.safe_load(done.stdout) or {}).get("applications", {}).get("clipfleet", {}).get("status", "")


def measure() -> list[Row]:
    """Settings that change in place, with two replicas of each deployment."""
    shown = pictures("tiny")
    rows = []
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as temporary:
        folder = Path(temporary)
        with cluster(folder / "ray") as variables:
            _deploy(config(REPLICAS, model="tiny"), folder, variables)
            end = time.monotonic() + 180
            while not is_ready(PORT):
                if time.monotonic() > end:
                    raise TimeoutError("the application did not become ready")
                time.sleep(1)
            with traffic(PORT, shown, CLIENTS) as seen:
                time.sleep(3)
                began = time.monotonic()
                _deploy(config(REPLICAS, model="tiny", limits={"deadline_s": 25}), folder, variables)
                time.sleep(5)
                while _status(variables) != "RUNNING" and time.monotonic() - began < 300:
                    time.sleep(1)
                took = time.monotonic() - began
                time.sleep(5)
            rows.append(
                row_of(f"`serve deploy` of other limits, two replicas of each, done after {took:.0f} s", 1, seen)
            )
    return rows
