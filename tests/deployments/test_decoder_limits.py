"""The decoder's bounds: bytes held at once, and a child process for an image that may kill it."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from clipfleet.checkpoint import find_checkpoint
from clipfleet.errors import ImageCorrupt
from clipfleet.images import DEFAULT_LIMITS, decode
from deployments.decoder import MemoryBudget
from tests.deployments.broken import BROKEN


def test_bytes_wait_until_they_fit() -> None:
    budget = MemoryBudget(100)
    entered = threading.Event()

    def second() -> None:
        with budget.hold(60):
            entered.set()

    thread = threading.Thread(target=second)
    with budget.hold(60):
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()


def test_a_larger_image_gets_its_turn_alone() -> None:
    budget = MemoryBudget(100)
    with budget.hold(5000):
        pass
    with pytest.raises(ValueError, match="broken"), budget.hold(100):
        raise ValueError("broken")
    with budget.hold(100):  # was given back
        pass


def child(data: bytes) -> object:
    spec = find_checkpoint("tiny").pixels
    done = subprocess.run(
        [sys.executable, "-m", "deployments.decode_child"],
        input=pickle.dumps((data, spec, DEFAULT_LIMITS)),
        capture_output=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    return pickle.loads(done.stdout)


def test_the_child_gives_the_same_pixels_and_errors(files: list[bytes]) -> None:
    pixels = child(files[0])
    assert isinstance(pixels, np.ndarray)
    assert np.array_equal(pixels, decode(files[0], find_checkpoint("tiny").pixels).pixels)
    assert isinstance(child(BROKEN["cut PNG"].data), ImageCorrupt)


def test_the_child_loads_neither_torch_nor_ray() -> None:
    program = "import sys, deployments.decode_child; print(*{'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_a_child_that_dies_is_seen_by_its_status() -> None:
    process = subprocess.Popen([sys.executable, "-m", "deployments.decode_child"], stdin=subprocess.PIPE)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert process.stdin is not None
    process.stdin.close()
