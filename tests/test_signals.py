"""Signals that end a run are heard wherever they come."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from slidescan.endings import heeded_signals

PROGRAM = """
import signal, sys, time, weakref
from slidescan.endings import heeded_signals

class Ends:
    def __del__(self):
        signal.raise_signal(signal.{name})
        time.sleep(0)  # here Python acts on it, and drops what is raised

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has those it starts behind it ignore it
try:
    with heeded_signals():
        Ends()
        time.sleep(30)
        print("went on")
except KeyboardInterrupt:
    print("heard")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_one_that_comes_in_a_finalizer_is_heard(name: str) -> None:
    """Python drops what a finalizer raises: it comes again, and nothing of that is said."""
    command = [sys.executable, "-c", PROGRAM.format(name=name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("heard\n", "")


def test_afterwards_all_is_as_before() -> None:
    names = signal.SIGTERM, signal.SIGALRM, signal.SIGINT
    before = [signal.getsignal(name) for name in names], sys.unraisablehook
    with heeded_signals():
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert ([signal.getsignal(name) for name in names], sys.unraisablehook) == before
