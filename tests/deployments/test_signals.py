"""What SIGHUP does to a command, by where it was started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from deployments import signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("terminal", "nohup", "stops"),
    [
        ((True, True), False, False),  # from another terminal
        ((False, False), False, False),  # a service unit
        ((True, False), False, True),  # its terminal has ended
        ((True, False), True, False),
    ],
)
def test_a_hangup(terminal: tuple[bool, bool], nohup: bool, stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(terminal)
    monkeypatch.setattr(signals, "_has_terminal", lambda: next(answers))
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    signals.stop_on_signals()
    with signals.hangups() as came:
        if stops:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGHUP)
        else:
            os.kill(os.getpid(), signal.SIGHUP)
        assert came.is_set() is not stops
