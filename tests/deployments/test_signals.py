"""What SIGHUP does to a command, by where it was started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.deployments.service import ROOT

COMMAND = """
import os, signal, sys
from deployments import signals

answers = iter([word == "True" for word in sys.argv[1:3]])
signals._has_terminal = lambda: next(answers)
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[3] == "True" else signal.SIG_DFL)
signals.stop_on_signals()
try:
    with signals.hangups() as came:
        os.kill(os.getpid(), signal.SIGHUP)
        came.wait(10)
        print("reads its file" if came.is_set() else "nothing")
except KeyboardInterrupt:
    print("stops")
"""


@pytest.mark.parametrize(
    ("before", "then", "nohup", "does"),
    [
        (True, True, False, "reads its file"),  # sent from another terminal
        (False, False, False, "reads its file"),  # a service unit
        (True, False, False, "stops"),  # its terminal has ended
        (True, False, True, "reads its file"),
    ],
)
def test_a_hangup(before: bool, then: bool, nohup: bool, does: str) -> None:
    """`before` and `then` say whether the command has a terminal."""
    words = [str(word) for word in (before, then, nohup)]
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == does, done.stderr
