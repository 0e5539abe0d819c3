"""A process apart that decodes: the same pixels and errors, and an image that ends it is named."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
from PIL import Image

from clipfleet import decode_process, turns
from clipfleet.checkpoint import find_checkpoint
from clipfleet.decode_process import DecodeProcess, Section, Source, Uri
from clipfleet.errors import (
    ImageCorrupt,
    ImageCrashedDecoder,
    ImageNotFound,
    ImageTooManyPixels,
    ImageUnreadable,
)
from clipfleet.images import decode
from tests.deployments.broken import BROKEN
from tests.deployments.processes import Process, below, until
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


@pytest.mark.parametrize("kind", ["file", "object", "section"])
def test_what_is_not_read_in_time_is_unreadable_and_may_be_tried_again(
    process: DecodeProcess, pixels: np.ndarray, files: list[bytes], slow: bytes, tmp_path: Path, kind: str
) -> None:
    def source(name: str, data: bytes) -> Source:
        (tmp_path / name).write_bytes(data)
        place = str(tmp_path / name)
        return {"file": Path(place), "object": Uri(f"file://{place}"), "section": Section(place, 0, len(data))}[kind]

    small, large = source("small", files[0]), source("large", slow)
    assert process.decode_into(small, pixels) == decode(files[0], SPEC)[1:]
    for child in children():
        os.kill(child.pid, signal.SIGSTOP)
    assert isinstance(process.decode_into(small, pixels, timeout_s=0.2, tries=1), ImageUnreadable), "too slow"
    assert process.decode_into(small, pixels) == decode(files[0], SPEC)[1:]
    timer = kill_child_at_work()
    assert isinstance(process.decode_into(small, pixels, tries=1), ImageUnreadable), "it died before"
    timer.join()
    process.decode_into(small, pixels)
    assert isinstance(process.decode_into(large, pixels, timeout_s=0.3, tries=1), ImageCrashedDecoder), "it was read"


def test_a_process_that_does_not_end_is_left_behind(
    process: DecodeProcess, pixels: np.ndarray, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for a file system which does not answer."""
    process.decode_into(files[0], pixels)
    there = process._process
    assert there is not None
    os.kill(there.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(there, "kill", lambda: None)
        patch.setattr(decode_process, "_END_S", 0.2)
        closing = threading.Thread(target=process.close)
        closing.start()
        closing.join(30)
        left_behind = not closing.is_alive()
    there.kill()
    closing.join()
    assert left_behind
    assert process.decode_into(files[0], pixels) == decode(files[0], SPEC)[1:]
    there.wait()


@pytest.fixture(scope="module")
def large() -> bytes:
    """An image that takes much memory and little time."""
    return encode(Image.new("L", (7500, 7500)), "PNG")


@pytest.fixture
def turns_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """All turns of this node, as other processes' until it is closed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with ExitStack() as taken:
        for path in turns.paths():
            fcntl.flock(taken.enter_context(path.open("a")), fcntl.LOCK_EX)
        yield taken


def test_large_images_wait_for_a_turn(
    pixels: np.ndarray, files: list[bytes], large: bytes, tmp_path: Path, turns_taken: ExitStack
) -> None:
    (tmp_path / "large.png").write_bytes(large)
    ended: list[object] = []

    def decode_large(process: DecodeProcess, source: Source) -> None:
        ended.append(process.decode_into(source, pixels.copy(), timeout_s=2, tries=1))

    processes = [DecodeProcess(SPEC, turn_s=60) for _ in range(2)]
    work = [
        threading.Thread(target=decode_large, args=pair)
        for pair in zip(processes, [large, tmp_path / "large.png"], strict=True)
    ]
    try:
        assert processes[0].decode_into(files[0], pixels) == decode(files[0], SPEC)[1:], "small ones need none"
        for thread in work:
            thread.start()
        time.sleep(2.5)
        assert not ended, "nor does it count as the time for decoding"
        turns_taken.close()
        for thread in work:
            thread.join(60)
        assert ended == [(7500, 7500)] * 2
    finally:
        for process in processes:
            process.close()


def is_taken(turn: TextIO) -> bool:
    taken = not turns._take(turn.fileno())
    fcntl.flock(turn, fcntl.LOCK_UN)
    return taken


def test_whoever_dies_gives_its_turn_back(
    large: bytes, slow: bytes, turns_taken: ExitStack, pixels: np.ndarray
) -> None:
    turns_taken.close()
    paths = turns.paths()
    with ExitStack() as others, paths[0].open("a") as last:
        for path in paths[1:]:
            fcntl.flock(others.enter_context(path.open("a")), fcntl.LOCK_EX)
        process = DecodeProcess(SPEC, turn_s=60)
        thread = threading.Thread(target=process.decode_into, args=(slow, pixels.copy()), kwargs={"tries": 1})
        thread.start()
        until(lambda: is_taken(last), 60, "its turn")
        for child in children():
            os.kill(child.pid, signal.SIGKILL)
        thread.join(60)
        assert process.decode_into(large, pixels, timeout_s=30, tries=1) == (7500, 7500)
        process.close()


def test_what_is_refused_waits_for_no_turn(pixels: np.ndarray, turns_taken: ExitStack) -> None:
    narrow = encode(Image.new("L", (1, 2_000_000)), "PNG")
    process = DecodeProcess(SPEC, turn_s=600)
    ended: list[object] = []
    thread = threading.Thread(target=lambda: ended.append(process.decode_into(narrow, pixels, tries=1)))
    thread.start()
    thread.join(30)
    process.close()
    thread.join()
    assert isinstance(ended[0], ImageTooManyPixels)


def test_a_turn_that_never_comes_is_done_without(large: bytes, pixels: np.ndarray, turns_taken: ExitStack) -> None:
    process = DecodeProcess(SPEC, turn_s=0.5)
    try:
        assert process.decode_into(large, pixels, timeout_s=30, tries=1) == (7500, 7500)
    finally:
        process.close()


def test_who_asks_for_no_turns_waits_for_none(
    process: DecodeProcess, large: bytes, pixels: np.ndarray, turns_taken: ExitStack
) -> None:
    """As the service, whose decoders have a budget of their own and deadlines."""
    assert process.decode_into(large, pixels, timeout_s=30, tries=1) == (7500, 7500)


def test_the_turns_of_a_node_are_of_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(turns, "_LIMIT", limit)
    whole = turns.count()
    assert whole >= 1
    for text, expected in (("max", whole), (str(2**30), 1), (str(2**50), whole)):
        limit.write_text(f"{text}\n")
        assert turns.count() == expected


def test_it_loads_neither_torch_nor_ray() -> None:
    program = (
        "import sys, clipfleet.decode_process; print(*{'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
