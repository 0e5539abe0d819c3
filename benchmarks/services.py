"""The services that are compared: how each starts, is asked and stops."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import yaml

from benchmarks import data
from benchmarks.environments import INFINITY, INFINITY_WITHOUT, LITSERVE, environment
from benchmarks.processes import memory, stop
from clipfleet.load import Load, Request, image_request, json_request, run_load
from scripts.draw_shapes import COLOURS, SHAPES

START_S = 300
MANY = 16  # images of a request that has many
Name = str


@dataclass
class Work:
    """What is sent: pictures, and texts that never repeat, so that no cache has one of them."""

    images: Sequence[bytes]
    sent: int = 0

    def texts(self, count: int) -> list[str]:
        """About 13 tokens each, all of words that the checkpoint's tokenizer knows."""
        self.sent += count
        return [_text(self.sent - place) for place in range(count)]


def _text(number: int) -> str:
    words = []
    colours = tuple(COLOURS)
    for choices in (colours, SHAPES, colours, SHAPES, colours):
        number, choice = divmod(number, len(choices))
        words.append(choices[choice])
    first, second, third, fourth, ground = words
    return f"a {first} {second} and a {third} {fourth} on a {ground} background"


@dataclass
class Service:
    """A kind of service, and what was measured of it."""

    name: str
    command: Callable[[int], list[str | Path]]
    image: Callable[[Sequence[bytes]], Request]
    text: Callable[[str], Request]
    ready: str
    variables: dict[str, str] = field(default_factory=dict)
    packed: Callable[[Sequence[bytes]], Request] | None = None  # images as base64 in JSON, where that is another form
    metrics: Callable[[int], str] | None = None  # address of Prometheus metrics
    full: bool = True  # otherwise 16 clients alone, with single images and with texts
    loads: dict[Name, list[Load]] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)
    batch_sizes: list[float] = field(default_factory=list)
    megabytes: dict[str, float] = field(default_factory=dict)

    def measure(self, work: Work) -> None:
        """Start it, load it in each way, and stop it."""
        single = [self.image([image]) for image in work.images]
        with self.running() as (port, pid):
            url = f"http://127.0.0.1:{port}"

            def load(name: Name, requests: Sequence[Request], count: int, clients: int) -> None:
                found = run_load(url, islice(cycle(requests), count), clients)
                if found.failures:
                    raise RuntimeError(f"{self.name}, {name}: {found.failures}")
                self.loads.setdefault(name, []).append(found)

            def queries(count: int) -> list[Request]:
                return [self.text(text) for text in work.texts(count)]

            run_load(url, single[:32] + queries(32), 16)
            load("16 clients", single, 128, 16)
            load("texts", queries(768), 768, 16)
            if self.full:
                load("1 client", single, 24, 1)
                if self.packed:
                    load("16 clients, base64 in JSON", [self.packed([image]) for image in work.images], 128, 16)
                before = self._batches(port)
                load("64 clients", single, 256, 64)
                after = self._batches(port)
                if before and after:
                    self.batch_sizes.append((after[0] - before[0]) / (after[1] - before[1]))
                many = [self.image(list(islice(cycle(work.images), at, at + MANY))) for at in range(0, 160, MANY)]
                load("16 images a request", many, 10, 4)
                load("text alone", queries(40), 40, 1)
                with saturated(url, single):
                    load("text beside images", queries(40), 40, 1)
            self.megabytes = memory(pid)
        print(f"{self.name}: " + ", ".join(
            f"{name} {found[-1].rate:.1f}/s (p50 {found[-1].p50 * 1000:.0f} ms, p99 {found[-1].p99 * 1000:.0f} ms)"
            for name, found in self.loads.items()
        ) + f", ready in {self.starts[-1]:.1f} s", flush=True)  # fmt: skip

    def _batches(self, port: int) -> tuple[float, float] | None:
        """Sum and count of the batch sizes of images so far."""
        if self.metrics is None:
            return None
        time.sleep(4.5)  # they are exported every 2 s
        with urllib.request.urlopen(self.metrics(port), timeout=30) as answer:
            text = answer.read().decode()
        found = [
            sum(map(float, re.findall(rf'^ray_clipfleet_batch_size_{part}{{.*tower="image".*}} (\S+)$', text, re.M)))
            for part in ("sum", "count")
        ]
        return found[0], found[1]

    @contextmanager
    def running(self) -> Iterator[tuple[int, int]]:
        """Yields its port and its process id."""
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
                    time.sleep(0.1)
                self.starts.append(time.monotonic() - started)
                yield port, process.pid
            finally:
                stop(process)

    def _answers(self, port: int) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", self.ready)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


@contextmanager
def saturated(url: str, requests: Sequence[Request]) -> Iterator[None]:
    """Sixteen clients send images for as long as the block runs."""
    stop = threading.Event()

    def forever() -> Iterator[Request]:
        for request in cycle(requests):
            if stop.is_set():
                return
            yield request

    thread = threading.Thread(target=run_load, args=(url, forever(), 16))
    thread.start()
    time.sleep(3)
    try:
        yield
    finally:
        stop.set()
        thread.join()


def clipfleet(checkpoint: str | Path, folder: Path, precision: str = "float32", jpeg: str = "whole") -> Service:
    """configs/demo.yaml, which is for 2 cores, with as many threads an encoder as there are cores."""
    config = yaml.safe_load((data.ROOT / "configs" / "demo.yaml").read_text())
    threads = os.cpu_count() or 1
    settings = {"precision": precision, "threads_per_replica": threads, "reduced_jpeg": jpeg == "reduced"}
    config["applications"][0]["args"] |= settings
    file = folder / f"{precision}-{jpeg}.yaml"
    file.write_text(yaml.safe_dump(config))
    return Service(
        f"clipfleet, {precision}, {jpeg} JPEGs",
        lambda port: [
            Path(sys.executable).parent / "clipfleet", "serve", file, "--model", str(checkpoint),
            "--port", str(port), "--metrics-port", str(port - 1),
        ],
        image_request,
        lambda text: json_request(texts=[text]),
        "/readyz",
        packed=json_request,
        metrics=lambda port: f"http://127.0.0.1:{port - 1}/metrics",
    )  # fmt: skip


def infinity(checkpoint: Path) -> Service:
    executable = environment("infinity", INFINITY, INFINITY_WITHOUT) / "infinity_emb"

    def request(modality: str, contents: list[str]) -> Request:
        body = {"model": "bench", "input": contents, "modality": modality, "encoding_format": "base64"}
        return Request("/embeddings", {"Content-Type": "application/json"}, json.dumps(body).encode(), len(contents))

    return Service(
        "infinity-emb 0.0.78",
        lambda port: [
            executable, "v2", "--model-id", checkpoint, "--served-model-name", "bench", "--engine", "torch",
            "--device", "cpu", "--no-bettertransformer", "--batch-size", "32", "--host", "127.0.0.1", "--port", str(port),
        ],
        lambda images: request("image", [f"data:image/jpeg;base64,{base64.b64encode(one).decode()}" for one in images]),
        lambda text: request("text", [text]),
        "/health",
        {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"},
    )  # fmt: skip


def litserve(checkpoint: Path) -> Service:
    python = environment("litserve", LITSERVE) / "python"
    program = Path(__file__).parent / "peers" / "litserve_server.py"

    def request(path: str, content: dict[str, str]) -> Request:
        return Request(path, {"Content-Type": "application/json"}, json.dumps(content).encode())

    return Service(
        "LitServe 0.2.17",
        lambda port: [python, program, checkpoint, str(port)],
        lambda images: request("/images", {"image": base64.b64encode(images[0]).decode()}),
        lambda text: request("/texts", {"text": text}),
        "/health",
        {"HF_HUB_OFFLINE": "1"},
        full=False,
    )
