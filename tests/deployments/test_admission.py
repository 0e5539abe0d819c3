"""What the ingress takes on: items and bytes in flight, and what could not be done in time."""

from __future__ import annotations

import pytest

from clipfleet.errors import Overloaded
from clipfleet.settings import LimitSettings
from deployments import admission
from deployments.admission import Admission
from deployments.responses import error_response


def test_items_over_the_limit_are_refused_until_others_are_done() -> None:
    held = Admission(LimitSettings(inflight_items=10))
    with held.hold_items(8, 30):
        with (
            pytest.raises(Overloaded, match=r"8 items are in flight; the limit is 10") as refused,
            held.hold_items(3, 30),
        ):
            pass
        with held.hold_items(2, 30):
            assert held.items == 10
    assert held.items == 0
    answer = error_response(refused.value)
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1


def test_one_request_over_the_limit_gets_its_turn_alone() -> None:
    held = Admission(LimitSettings(inflight_items=10, inflight_bytes=100))
    with held.hold_items(11, 30), held.hold_bytes(101):
        assert (held.items, held.bytes) == (11, 101)


def test_bytes_over_the_limit_are_refused() -> None:
    held = Admission(LimitSettings(inflight_bytes=100))
    with held.hold_bytes(60):
        with pytest.raises(Overloaded, match="60 bytes"), held.hold_bytes(41):
            pass
        with held.hold_bytes(40):
            pass
    assert held.bytes == 0


def test_a_failed_request_gives_back_what_it_held() -> None:
    held = Admission(LimitSettings())
    with pytest.raises(ValueError, match="failed"), held.hold_items(5, 30), held.hold_bytes(5):
        raise ValueError("failed")
    assert (held.items, held.bytes) == (0, 0)


def test_what_cannot_be_done_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(admission.time, "monotonic", lambda: clock)
    held = Admission(LimitSettings())
    for _ in range(10):  # two items a second
        with held.hold_items(1, 30):
            clock += 0.5
    with held.hold_items(50, 30):
        with pytest.raises(Overloaded, match=r"take 3\d s at the present rate; the request has 30 s left"):
            held.hold_items(20, 30).__enter__()
        with held.hold_items(5, 30):
            pass
