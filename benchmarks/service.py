"""Requests to vectors over HTTP: `clipfleet serve` against infinity-emb, with the load generator on the same cores.

Both get the same photographs, one a request: clipfleet as raw bytes, infinity as the data URI that its API takes. Every
repetition starts, warms, loads and stops one service after the other.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import yaml

from benchmarks import data
from benchmarks.environments import INFINITY, INFINITY_WITHOUT, environment
from benchmarks.programs import Spread, ratio
from benchmarks.report import Row
from clipfleet.samples import texts

FILES = 64
START_S = 300
# name: requests and clients
LOADS = {"1 client": (24, 1), "16 clients": (160, 16), "64 clients": (256, 64)}
TEXTS = (512, 16)


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Load:
    """What one run of requests took."""

    rate: float  # requests/s
    p50: float  # seconds
    p99: float


def load(port: int, requests: Sequence[Request], clients: int) -> Load:
    """Send the requests from `clients` threads, each on one kept connection."""
    pending, seconds, lock = iter(requests), list[float](), threading.Lock()
    failures: list[str] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while not failures:
            with lock:
                request = next(pending, None)
            if request is None:
                break
            started = time.perf_counter()
            connection.request("POST", request.path, request.body, request.headers)
            answer = connection.getresponse()
            content = answer.read()
            seconds.append(time.perf_counter() - started)
            if answer.status != 200:
                failures.append(f"{answer.status} {content[:300]!r}")
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    if failures:
        raise RuntimeError(f"a request failed: {failures[0]}")
    return Load(len(requests) / elapsed, statistics.median(seconds), statistics.quantiles(seconds, n=100)[98])


@dataclass
class Service:
    """A kind of service: how it starts, and how it is asked."""

    name: str
    command: Callable[[int], list[str | Path]]
    image: Callable[[bytes], Request]
    text: Callable[[str], Request]
    ready: str
    variables: dict[str, str] = field(default_factory=dict)
    loads: dict[str, list[Load]] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)

    def measure(self, images: Sequence[bytes], words: Sequence[str]) -> None:
        """Start it, load it once in each way, and stop it."""
        pictures = [self.image(image) for image in images]
        queries = [self.text(word) for word in words]
        with self._running() as port:
            load(port, [*pictures[:32], *queries[:32]], 16)
            for name, (count, clients) in LOADS.items():
                self.loads.setdefault(name, []).append(load(port, list(islice(cycle(pictures), count)), clients))
            self.loads.setdefault("texts", []).append(load(port, list(islice(cycle(queries), TEXTS[0])), TEXTS[1]))
        print(f"{self.name}: " + ", ".join(
            f"{name} {found[-1].rate:.1f}/s (p50 {found[-1].p50 * 1000:.0f} ms, p99 {found[-1].p99 * 1000:.0f} ms)"
            for name, found in self.loads.items()
        ) + f", ready in {self.starts[-1]:.1f} s", flush=True)  # fmt: skip

    @contextmanager
    def _running(self) -> Iterator[int]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with tempfile.TemporaryFile() as log:
            started = time.monotonic()
            process = subprocess.Popen(
                [str(part) for part in self.command(port)],
                env={**os.environ, **self.variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                while not self._answers(port):
                    if process.poll() is not None or time.monotonic() - started > START_S:
                        log.seek(0)
                        raise RuntimeError(f"{self.name} did not start:\n{log.read().decode(errors='replace')[-3000:]}")
                    time.sleep(0.2)
                self.starts.append(time.monotonic() - started)
                yield port
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def _answers(self, port: int) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", self.ready)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def rates(self, name: str) -> Spread:
        return Spread.of([found.rate for found in self.loads[name]])

    def times(self, name: str, part: str) -> Spread:
        """p50 or p99 in milliseconds."""
        return Spread.of([getattr(found, part) * 1000 for found in self.loads[name]])


def clipfleet(checkpoint: Path, precision: str, folder: Path) -> Service:
    """configs/demo.yaml, which is for 2 cores, with as many threads an encoder as there are cores."""
    config = yaml.safe_load((data.ROOT / "configs" / "demo.yaml").read_text())
    threads = os.cpu_count() or 1
    config["applications"][0]["args"] |= {"precision": precision, "threads_per_replica": threads}
    file = folder / f"{precision}.yaml"
    file.write_text(yaml.safe_dump(config))
    json_type = {"Content-Type": "application/json"}
    return Service(
        f"clipfleet {precision}",
        lambda port: [
            Path(sys.executable).parent / "clipfleet", "serve", file, "--model", checkpoint,
            "--port", str(port), "--metrics-port", str(port - 1),
        ],
        lambda image: Request(
            "/v1/embeddings/images", {"Content-Type": "image/jpeg", "Accept": "application/x-npy"}, image
        ),
        lambda text: Request("/v1/embeddings", json_type, json.dumps({"input": text, "encoding_format": "base64"}).encode()),
        "/readyz",
    )  # fmt: skip


def infinity(checkpoint: Path) -> Service:
    executable = environment("infinity", INFINITY, INFINITY_WITHOUT) / "infinity_emb"

    def request(modality: str, content: str) -> Request:
        body = {"model": "bench", "input": [content], "modality": modality, "encoding_format": "base64"}
        return Request("/embeddings", {"Content-Type": "application/json"}, json.dumps(body).encode())

    return Service(
        "infinity-emb 0.0.78",
        lambda port: [
            executable, "v2", "--model-id", checkpoint, "--served-model-name", "bench", "--engine", "torch",
            "--device", "cpu", "--no-bettertransformer", "--batch-size", "32", "--host", "127.0.0.1", "--port", str(port),
        ],
        lambda image: request("image", f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"),
        lambda text: request("text", text),
        "/health",
        {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"},
    )  # fmt: skip


def measure(repetitions: int) -> list[Row]:
    checkpoint = data.checkpoint()
    images = [path.read_bytes() for path in data.files(data.photographs(384))[:FILES]]
    words = texts(128, 3)
    with tempfile.TemporaryDirectory() as folder:
        exact, quick = (clipfleet(checkpoint, precision, Path(folder)) for precision in ("float32", "int8"))
        theirs = infinity(checkpoint)
        for _ in range(repetitions):
            for service in (exact, theirs, quick):
                service.measure(images, words)
    rows: list[Row] = []
    for ours, precision, rate, texts_, wait in (
        (exact, "float32", "1.6", "2.3", "1"),
        (quick, "int8", "4", "5", "0.5"),
    ):

        def row(work: str, name: str, part: str, target: str, ours: Service = ours, precision: str = precision) -> None:
            sides = [side.rates(name) if part == "rate" else side.times(name, part) for side in (ours, theirs)]
            unit = "/s" if part == "rate" else f"ms {part}"
            rows.append(
                Row(f"{work}, {precision}", unit, sides[0], sides[1], theirs.name, ratio(sides[0], sides[1]), target)
            )

        row("service, 16 clients, one image a request", "16 clients", "rate", rate)
        row("service, 16 clients, one image a request", "16 clients", "p50", "below 1")
        row("service, 16 clients, one image a request", "16 clients", "p99", "below 1")
        row("service, 1 client, one image a request", "1 client", "p50", f"at most {wait}")
        row("service, texts, 16 clients", "texts", "rate", texts_)
        row("service, 64 clients, one image a request", "64 clients", "rate", "none")
    return rows
