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
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from PIL import ExifTags, Image

from benchmarks import data
from benchmarks.processes import below
from clipfleet.checkpoint import find_checkpoint
from clipfleet.fingerprint import fingerprint
from faults.chaos import CLIENTS, pictures, row_of, vectors_of
from faults.report import Row
from faults.served import ROOT, config, is_ready
from faults.traffic import Picture, Seen, traffic

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


def _turned(folder: Path) -> list[Picture]:
    """Photographs that say that they are turned, with their vectors with and without heeding that."""
    plain = data.files(data.photographs(data.LIBRARY_FILES))[:32]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    segment = b"\xff\xe1" + (2 + len(exif.tobytes())).to_bytes(2, "big") + exif.tobytes()
    turned = [folder / file.name for file in plain]
    for file, other in zip(plain, turned, strict=True):
        content = file.read_bytes()
        other.write_bytes(content[:2] + segment + content[2:])
    tiny = find_checkpoint("tiny")
    ways = [
        (fingerprint(tiny, exif_orientation=heeded), vectors_of("tiny", files))
        for heeded, files in ((True, turned), (False, plain))
    ]
    return [
        Picture(file.read_bytes(), {made_by: found[number : number + 1] for made_by, found in ways})
        for number, file in enumerate(turned)
    ]


def _changed(shown: list[Picture], folder: Path, variables: dict[str, str], **arguments: Any) -> tuple[Seen, float]:
    """What clients see of a deploy of other arguments, and the seconds that it takes."""
    with traffic(PORT, shown, CLIENTS) as seen:
        time.sleep(3)
        began = time.monotonic()
        _deploy(config(REPLICAS, model="tiny", **arguments), folder, variables)
        time.sleep(5)
        while _status(variables) != "RUNNING" and time.monotonic() - began < 300:
            time.sleep(1)
        took = time.monotonic() - began
        time.sleep(5)
    return seen, took


def measure() -> list[Row]:
    """Settings that change in place, with two replicas of each deployment."""
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
            seen, took = _changed(pictures("tiny"), folder, variables, limits={"deadline_s": 25})
            rows.append(
                row_of(f"`serve deploy` of other limits, two replicas of each, done after {took:.0f} s", 1, seen)
            )
            seen, took = _changed(_turned(folder), folder, variables, exif_orientation=False)
            row = row_of(f"`serve deploy` that turns EXIF off, so other vectors, done after {took:.0f} s", 1, seen)
            # What would mix the two is refused; a wrong vector is one that is not of the fingerprint beside it.
            kept = not seen.wrong and set(seen.failures) <= {"status 503"} and len(seen.fingerprints) == 2
            by = ", ".join(f"{made_by} {count}" for made_by, count in seen.fingerprints.items())
            rows.append(replace(row, outcome=f"{row.outcome}; answers by fingerprint: {by}", kept=kept))
    return rows
