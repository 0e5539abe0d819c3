"""`make demo`: the whole of clipfleet on real input, from a pile of pictures to search, and nothing left behind.

Draws labelled shapes, adds photographs that installed packages ship, indexes them with the offline job, serves the embedded
checkpoint and the index, asks for rankings and searches, embeds the same pictures over HTTP and with the library, and compares
the vectors. `make demo KEEP=1` leaves the service up, with its page, until Ctrl-C.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
from draw_shapes import LABELS, draw
from loguru import logger

from clipfleet import CLIPEmbedder

CLIPFLEET = [sys.executable, "-m", "clipfleet.cli"]
PHOTOGRAPHS = {  # (package, path in it): real pictures of several formats, modes and sizes
    "astronaut.png": ("skimage", "data/astronaut.png"),
    "camera.png": ("skimage", "data/camera.png"),
    "cat.png": ("skimage", "data/chelsea.png"),
    "coffee.png": ("skimage", "data/coffee.png"),
    "rocket.jpg": ("skimage", "data/rocket.jpg"),
    "temple.jpg": ("sklearn", "datasets/images/china.jpg"),
    "flower.jpg": ("sklearn", "datasets/images/flower.jpg"),
}
TOLERANCE = 1e-5


def say(text: str) -> None:
    print(text, flush=True)


def make_pictures(folder: Path) -> list[Path]:
    """One drawing for each of eight labels, and the photographs."""
    rng = random.Random(11)
    wanted = set(rng.sample(LABELS, 8))
    while wanted:
        drawing = draw(rng)
        if drawing.label in wanted:
            wanted.remove(drawing.label)
            drawing.image.save(folder / f"{drawing.label.replace(' ', '-')}.png")
    for name, (package, path) in PHOTOGRAPHS.items():
        shutil.copy(_package_folder(package) / path, folder / name)
    return sorted(folder.iterdir())


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"the demo's photographs come with {package}, which is not installed: run `make setup`")
    return Path(spec.origin).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end(process: subprocess.Popen[str]) -> int:
    """Stop a command in order, and if that takes too long, at once; its guardian ends what it leaves."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(120)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@contextmanager
def service(index: Path) -> Iterator[str]:
    """Run `clipfleet serve demo` on free ports; yield its address, stop it, and insist that it stopped well."""
    arguments = ["serve", "demo", "--index", str(index), "--port", str(free_port()), "--metrics-port", str(free_port())]
    say(f"$ clipfleet {' '.join(arguments)}")
    started = time.monotonic()
    process = subprocess.Popen([*CLIPFLEET, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline().strip()
        if not ready.startswith("clipfleet ready: "):
            sys.exit("the service did not start; its message stands above")
        say(f"{ready} (after {time.monotonic() - started:.0f} s)")
        yield ready.split()[2]
    finally:
        status = end(process)
    if status:
        sys.exit(f"the service ended with status {status}")
    say("service stopped")


def embed_by_http(client: httpx.Client, pictures: list[Path]) -> np.ndarray:
    """All pictures in one multipart request, the answer as .npy: (n, d)."""
    files = [("files", (picture.name, picture.read_bytes())) for picture in pictures]
    answer = client.post("/v1/embeddings/images", files=files, headers={"Accept": "application/x-npy"})
    answer.raise_for_status()
    return np.load(io.BytesIO(answer.content))


def show_ranking(client: httpx.Client, pictures: list[Path]) -> None:
    """Rank all 48 labels for each drawing, and stop if the right one is not first."""
    for picture in pictures:
        item = {"image": "data:image/png;base64," + _base64(picture)}
        answer = client.post("/v1/rank", json={"query": item, "candidates": list(LABELS)})
        answer.raise_for_status()
        best = answer.json()["results"][:3]
        ranking = ", ".join(f"{LABELS[result['index']]} {result['probability']:.1%}" for result in best)
        say(f"  {picture.name:20} {ranking}")
        if LABELS[best[0]["index"]] != picture.stem.replace("-", " "):
            sys.exit(f"{picture.name}: the right label is not first")


def _base64(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def search(client: httpx.Client, drawings: list[Path]) -> None:
    """Search for each drawing by its label, and stop if it is not found first."""
    for drawing in drawings:
        label = drawing.stem.replace("-", " ")
        answer = client.post("/v1/search", json={"query": label, "limit": 3})
        answer.raise_for_status()
        found = [f"{result['id']} {result['score']:.2f}" for result in answer.json()["results"]]
        say(f"  {label:20} {', '.join(found)}")
        if not found[0].startswith(drawing.name):
            sys.exit(f"{drawing.name} is not found first by {label!r}")


def make_index(folder: Path, index: Path) -> dict[str, np.ndarray]:
    """Run `clipfleet index` and read the job's Parquet files: vectors by file name."""
    say("$ clipfleet index PICTURES --folder INDEX --model tiny")
    command = [*CLIPFLEET, "index", str(folder), "--folder", str(index), "--model", "tiny"]
    job = subprocess.Popen(command, text=True, start_new_session=True)
    try:
        status = job.wait()
    finally:
        if job.poll() is None:
            end(job)
    if status:
        sys.exit(f"the job ended with status {status}")
    parts = [pq.read_table(part) for part in sorted((index / "vectors").glob("part-*.parquet"))]
    rows = [row for part in parts for row in part.to_pylist()]
    return {row["id"]: np.asarray(row["embedding"], np.float32) for row in rows}


def embed_by_library(pictures: list[Path]) -> np.ndarray:
    logger.disable("clipfleet")
    with CLIPEmbedder("tiny") as embedder:
        vectors = asyncio.run(embedder.generate_embeddings_batch(pictures, show_progress=False))
    return np.stack([vector for vector in vectors if vector is not None])


def main(keep: bool) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):  # of a CI's time limit, of a terminal that is closed
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="clipfleet-demo-", ignore_cleanup_errors=True) as temporary:
        folder, index = Path(temporary) / "pictures", Path(temporary) / "index"
        folder.mkdir()
        pictures = make_pictures(folder)
        drawings = [picture for picture in pictures if picture.name not in PHOTOGRAPHS]
        say(f"{len(pictures)} pictures: {len(drawings)} drawn shapes, {len(PHOTOGRAPHS)} photographs")
        job = make_index(folder, index)
        library = embed_by_library(pictures)
        with service(index) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            say("POST /v1/rank: each drawing against all 48 labels, best three")
            show_ranking(client, drawings)
            say("POST /v1/search: each label in the index, best three")
            search(client, drawings)
            say(f"POST /v1/embeddings/images: {len(pictures)} files in one request")
            served = embed_by_http(client, pictures)
            worst_job = max(float(np.abs(job[p.name] - v).max()) for p, v in zip(pictures, served, strict=True))
            worst_library = float(np.abs(library - served).max())
            say(f"{len(served)} vectors of {served.shape[1]} dimensions; largest difference of any number in them:")
            say(f"  service and job     {worst_job:.1e}\n  service and library {worst_library:.1e}")
            if max(worst_job, worst_library) > TOLERANCE:
                sys.exit(f"that is more than {TOLERANCE:.0e}")
            say(f"the page, with these pictures to search: {address}")
            if keep:
                say("Ctrl-C stops it")
                with suppress(KeyboardInterrupt):
                    signal.pause()
    say(f"demo finished in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main("--keep" in sys.argv[1:])
