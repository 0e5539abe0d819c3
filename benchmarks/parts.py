"""What the parts take by themselves: engines by batch size and threads, JPEG decoders, and each process of a loaded service.

These rows have no target; they show where the time goes and why the parts were chosen.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import data
from benchmarks.environments import environment
from benchmarks.processes import cpu_seconds
from benchmarks.programs import Spread, ratio
from benchmarks.report import Row
from benchmarks.services import clipfleet
from clipfleet import load_image
from clipfleet.checkpoint import find_checkpoint
from clipfleet.encoder import Encoder
from clipfleet.image_files import open_image
from clipfleet.images import to_picture
from clipfleet.load import image_request, run_load
from clipfleet.resize import resize, target_size

ENGINES = (("torch", "float32"), ("openvino", "float32"), ("openvino", "int8"))
BATCHES = (1, 8, 16, 32)
SECONDS = 2.0
DECODERS = ["simplejpeg", "opencv-python-headless", "pyvips[binary]", "pillow==13.0.0", "numpy==2.4.6"]
REQUESTS = 192


def measure(repetitions: int, notes: list[str]) -> list[Row]:
    return [
        *_engines(repetitions, notes),
        *_resizing(repetitions),
        *_decoding(repetitions),
        *_decoders(),
        *_processes(notes),
    ]


def _row(work: str, found: list[float], unit: str, against: str = "") -> Row:
    return Row(work, Spread.of(found), unit, against, None, Spread.of(found))


def _engines(repetitions: int, notes: list[str]) -> list[Row]:
    rows = []
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), 224, 224, 3), np.uint8)
    for engine, precision in ENGINES:
        for threads in (1, 2):
            encoder = Encoder(str(data.checkpoint()), "cpu", precision, ("image",), engine=engine, threads=threads)
            for size in BATCHES if threads == 2 else BATCHES[1:2]:
                rates = [_rate(encoder, pixels[:size]) for _ in range(repetitions)]
                rows.append(_row(f"{engine} {precision}, {threads} threads, batch {size}", rates, "images/s"))
            encoder.close()
    return [*rows, *_compiled(repetitions, pixels, notes)]


def _compiled(repetitions: int, pixels: np.ndarray, notes: list[str]) -> list[Row]:
    """torch.compile, which needs a C++ compiler."""
    import torch

    encoder = Encoder(str(data.checkpoint()), "cpu", "float32", ("image",), engine="torch", threads=2)
    tower = encoder._models["image"]
    tower.module = torch.compile(tower.module, dynamic=False)
    try:
        started = time.perf_counter()
        encoder.encode_pixels(pixels[:8])
        took = time.perf_counter() - started
        rates = [_rate(encoder, pixels[:8]) for _ in range(repetitions)]
    except Exception as error:  # no compiler, above all
        notes.append(f"torch.compile could not be measured: {(str(error).splitlines() or [''])[0]}")
        return []
    finally:
        encoder.close()
    notes.append(f"torch.compile took {took:.0f} s before its first batch of 8, again for each other size")
    return [_row("torch.compile float32, 2 threads, batch 8", rates, "images/s")]


def _rate(encoder: Encoder, pixels: np.ndarray) -> float:
    encoder.encode_pixels(pixels)
    started, images = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        encoder.encode_pixels(pixels)
        images += len(pixels)
    return images / (time.perf_counter() - started)


def _resizing(repetitions: int) -> list[Row]:
    """Decoded photographs to 224 px: by Pillow, and by its compiled form."""
    spec = find_checkpoint("tiny").pixels
    load_image(Image.new("RGB", (300, 300)))  # has Pillow keep images in one block from then on
    images = [Image.open(path).convert("RGB") for path in data.files(data.photographs(data.LIBRARY_FILES))[:60]]
    sizes = [target_size(*image.size, spec) for image in images]

    def pillow() -> None:
        for image, size in zip(images, sizes, strict=True):
            image.resize(size, spec.resample)

    def ours() -> None:
        for image, size in zip(images, sizes, strict=True):
            resize(image, size, spec, 64_000_000)

    a, b = _ms_of_a_core([ours, pillow], repetitions, len(images))
    return [Row("resize to 224 px, the same pixels", a, "ms of a core", "Pillow", b, ratio(b, a))]


def _decoding(repetitions: int) -> list[Row]:
    """Photographs in bytes to 224 px: in memory that the thread keeps, and in memory that Pillow takes for each, whose pages
    the C library keeps at its own settings (replicas have it return them, so that each would be new)."""
    spec = find_checkpoint("tiny").pixels
    photographs = [path.read_bytes() for path in data.files(data.photographs(data.LIBRARY_FILES))[:60]]

    def run(keep: bool) -> None:
        for photograph in photographs:
            with open_image(photograph) as image:
                to_picture(image, spec, keep=keep)

    a, b = _ms_of_a_core([lambda: run(False), lambda: run(True)], repetitions, len(photographs))
    return [Row("JPEG decoded and resized to 224 px", a, "ms of a core", "in memory of Pillow's", b, ratio(b, a))]


def _ms_of_a_core(programs: list[Callable[[], None]], repetitions: int, images: int) -> list[Spread]:
    """What each program takes an image, in turns, after one unmeasured turn."""
    took: list[list[float]] = [[] for _ in programs]
    for turn in range(repetitions + 1):
        pairs = list(zip(programs, took, strict=True))
        for program, found in reversed(pairs) if turn % 2 else pairs:
            started = time.process_time()
            program()
            if turn:
                found.append((time.process_time() - started) * 1000 / images)
    return [Spread.of(found) for found in took]


def _decoders() -> list[Row]:
    python = environment("decoders", DECODERS) / "python"
    files = data.files(data.photographs(data.LIBRARY_FILES))[:100]
    program = Path(__file__).parent / "peers" / "decoders.py"
    done = subprocess.run([python, program, *files], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return [
        _row(f"JPEG by {name}", of["ms"], "ms of a core", f"Pillow's pixels in {of['equal']} of {found['images']}")
        for name, of in found["decoders"].items()
    ]


def _processes(notes: list[str]) -> list[Row]:
    images = [path.read_bytes() for path in data.files(data.photographs(data.LIBRARY_FILES))[:96]]
    requests = [image_request([image]) for image in images]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("float32", "int8"):
            service = clipfleet(data.checkpoint(), Path(folder), precision)
            with service.running() as (port, pid):
                url = f"http://127.0.0.1:{port}"
                run_load(url, requests, 16)
                before = cpu_seconds(pid)
                load = run_load(url, islice(cycle(requests), REQUESTS), 16)
                after = cpu_seconds(pid)
            spent: dict[str, float] = {}
            for process, (name, seconds) in after.items():
                spent[name] = spent.get(name, 0) + (seconds - before.get(process, ("", 0.0))[1]) * 1000 / REQUESTS
            rows.append(
                _row(f"service, 16 clients, {precision}: all processes", [sum(spent.values())], "ms of a core an image")
            )
            listed = ", ".join(
                f"{name} {ms:.1f}" for name, ms in sorted(spent.items(), key=lambda item: -item[1]) if ms > 0.3
            )
            notes.append(
                f"ms of a core an image, service, 16 clients, {precision} ({load.rate:.1f} images/s): {listed}"
            )
    return rows
