"""The decoder's bound of bytes held at once."""

from __future__ import annotations

import threading

import pytest

from deployments.decoder import MemoryBudget


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
