"""A process apart that decodes: the same pixels and errors, and an image that ends it is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipfleet.checkpoint import find_checkpoint
from clipfleet.decode_process import DecodeProcess, Uri
from clipfleet.errors import ImageCorrupt, ImageCrashedDecoder, ImageNotFound, ImageUnreadable
from clipfleet.images import decode
from tests.deployments.broken import BROKEN
from tests.deployments.processes import Process, below
from tests.pictures import encode, picture

SPEC = find_checkpoint("tiny").pixels


@pytest.fixture
def process() -> Iterator[DecodeProcess]:
    process = DecodeProcess(SPEC)
    yield process
    process.close()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.zeros((*SPEC.size, 3), np.uint8)


@pytest.fixture(scope="module")
def slow() -> bytes:
    """An image that takes seconds to decode: 64 megapixels of noise."""
    noise = np.random.default_rng(0).integers(0, 3, (4000, 4000), np.uint8) * 80
    return encode(Image.fromarray(np.tile(noise, (2, 2))), "PNG")


def test_the_same_pixels_and_errors(process: DecodeProcess, pixels: np.ndarray, files: list[bytes]) -> None:
    expected = decode(files[0], SPEC)
    assert process.decode_into(files[0], pixels) == (expected.width, expected.height)
    assert np.array_equal(pixels, expected.pixels)
    assert isinstance(process.decode_into(BROKEN["cut PNG"].data, pixels), ImageCorrupt)


def test_objects_are_fetched_there(
    process: DecodeProcess, pixels: np.ndarray, files: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "one #1.png").write_bytes(files[1])
    address = (tmp_path / "one #1.png").as_uri()
    assert process.decode_into(Uri(address), pixels) == decode(files[1], SPEC)[1:]
    assert isinstance(process.decode_into(Uri(address + "x"), pixels), ImageNotFound)
    assert isinstance(process.decode_into(Uri("nosuch://there"), pixels), ImageUnreadable)


def children() -> list[Process]:
    return [child for child in below(os.getpid()) if "clipfleet.decode_process" in child.title]


def kill_child_at_work() -> threading.Timer:
    """Stop the process now and kill it later, so that no image is small enough to be decoded before."""
    stopped = children()
    for child in stopped:
        os.kill(child.pid, signal.SIGSTOP)

    def kill() -> None:
        for child in stopped:
            os.kill(child.pid, signal.SIGKILL)

    timer = threading.Timer(0.3, kill)
    timer.start()
    return timer


def test_an_image_that_ends_the_process(process: DecodeProcess, pixels: np.ndarray, files: list[bytes]) -> None:
    expected = decode(files[0], SPEC)[1:]
    process.decode_into(files[0], pixels)
    timer = kill_child_at_work()
    assert isinstance(process.decode_into(files[0], pixels, tries=1), ImageCrashedDecoder)
    timer.join()
    assert process.decode_into(files[0], pixels) == expected, "the next image has a new process"
    timer = kill_child_at_work()
    assert process.decode_into(files[0], pixels, tries=2) == expected, "a second try, as nobody kills that"
    timer.join()


def test_an_image_that_takes_too_long(process: DecodeProcess, pixels: np.ndarray, slow: bytes) -> None:
    process.decode_into(encode(picture("L", 9, 9), "PNG"), pixels)
    assert isinstance(process.decode_into(slow, pixels, timeout_s=0.1, tries=1), ImageCrashedDecoder)
    assert not children()


def test_it_loads_neither_torch_nor_ray() -> None:
    program = (
        "import sys, clipfleet.decode_process; print(*{'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
