"""What the ingress takes on: items and bytes in flight, and what could not be done in time."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest

from clipfleet.errors import Overloaded
from clipfleet.settings import LimitSettings
from deployments import admission
from deployments.admission import Admission
from deployments.responses import error_response


def test_items_over_the_limit_are_refused_until_others_are_done() -> None:
    held = Admission(LimitSettings(inflight_items=10))
    with held.hold_items(8, 0, 30):
        with (
            pytest.raises(Overloaded, match=r"8 images are in flight; the limit is 10") as refused,
            held.hold_items(3, 0, 30),
        ):
            pass
        with held.hold_items(2, 10, 30):
            assert [lane.items for lane in held.lanes.values()] == [10, 10]
    assert [lane.items for lane in held.lanes.values()] == [0, 0]
    answer = error_response(refused.value)
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1


def test_one_key_cannot_take_what_others_need() -> None:
    held = Admission(LimitSettings(inflight_items=100, inflight_items_per_key=10))
    with held.hold_items(6, 2, 30, "one"):
        with (
            pytest.raises(Overloaded, match=r"8 items of this API key are in flight; the limit of one key is 10"),
            held.hold_items(3, 0, 30, "one"),
        ):
            pass
        with held.hold_items(3, 0, 30, "another"), held.hold_items(3, 0, 30), held.hold_items(2, 0, 30, "one"):
            pass
    with held.hold_items(20, 0, 30, "one"):  # alone a request always goes
        pass
    with held.hold_items(8, 0, 30, "one"):
        pass


def test_one_request_over_the_limit_gets_its_turn_alone() -> None:
    held = Admission(LimitSettings(inflight_items=10, inflight_bytes=100))
    with held.hold_items(0, 11, 30), held.hold_bytes(101):
        assert (held.lanes["texts"].items, held.bytes) == (11, 101)


def test_a_body_in_many_pieces_gets_its_turn_alone() -> None:
    held = Admission(LimitSettings(inflight_bytes=100))
    with ExitStack() as pieces:
        for piece in range(10):
            pieces.enter_context(held.hold_bytes(50, own=50 * piece))
        with pytest.raises(Overloaded, match="500 bytes"), held.hold_bytes(1):
            pass
    assert held.bytes == 0


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
    with pytest.raises(ValueError, match="failed"), held.hold_items(5, 5, 30), held.hold_bytes(5):
        raise ValueError("failed")
    assert (held.lanes["images"].items, held.lanes["texts"].items, held.bytes) == (0, 0, 0)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(admission.time, "monotonic", lambda: self.now)


def test_what_cannot_be_done_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    held = Admission(LimitSettings())
    with held.hold_items(80, 0, 30):  # a backlog, of which others' four images a second are done
        for _ in range(20):
            with held.hold_items(1, 0, 30):
                clock.now += 0.25
        with pytest.raises(Overloaded, match=r"80 images are in flight; with these 64 they take 3\d s") as refused:
            held.hold_items(64, 0, 30).__enter__()
        assert 1 <= refused.value.data["retry_after"] <= 10
        with held.hold_items(20, 0, 30), held.hold_items(0, 2048, 0.5):  # in time; texts do not wait for images
            pass


def test_parts_of_long_lists_say_what_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    held = Admission(LimitSettings())
    with held.hold_items(640, 0, 30) as finish:
        for _ in range(4):
            clock.now += 0.5
            finish("images", 8)
        assert held.lanes["images"].items == 608
        with pytest.raises(Overloaded, match=r"608 images are in flight; with these 64 they take 4\d s"):
            held.hold_items(64, 0, 30).__enter__()
    assert held.lanes["images"].items == 0


def test_the_last_backlog_stands_for_the_beginning_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    held = Admission(LimitSettings(), {"images": 10.0, "texts": None}.get)
    with held.hold_items(240, 0, 30), pytest.raises(Overloaded, match=r"with these 64 they take 30 s"):
        held.hold_items(64, 0, 30).__enter__()
    with suppress(ValueError), held.hold_items(640, 0, 30) as finish:
        for _ in range(20):
            clock.now += 0.5
            finish("images", 8)
        raise ValueError("the rest was not done")
    clock.now += 3600
    with held.hold_items(320, 0, 30):
        with pytest.raises(Overloaded, match=r"320 images are in flight; with these 320 they take 4\d s"):
            held.hold_items(320, 0, 30).__enter__()
        with held.hold_items(64, 0, 30):
            pass


def test_few_in_flight_say_nothing_of_what_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    held = Admission(LimitSettings())
    for _ in range(20):  # one client that asks once in five seconds
        clock.now += 5
        with held.hold_items(1, 0, 30):
            clock.now += 0.1
    with held.hold_items(60, 0, 30), held.hold_items(1000, 0, 1):
        clock.now += 1


def test_a_key_has_half_of_the_bytes_where_its_items_are_limited() -> None:
    held = Admission(LimitSettings(inflight_bytes=100, inflight_items_per_key=10))
    with held.hold_bytes(40, key="a"):
        with pytest.raises(Overloaded, match="40 bytes of this API key's"), held.hold_bytes(11, key="a"):
            pass
        with held.hold_bytes(50, own=40, key="a"), held.hold_bytes(10, key="b"):
            pass
    held = Admission(LimitSettings(inflight_bytes=100))
    with held.hold_bytes(40, key="a"), held.hold_bytes(60, key="a"):
        pass
