"""A program ends at once, and with all that was to be said and done."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from slidescan.endings import ends_at_once
class Kept:
    def __del__(self):
        print("tidied up")
kept = Kept()
atexit.register(print, "at exit")
def main():
    sys.stdout.write("said ")
    {end}
ends_at_once(main)
"""


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit()", 0), ("sys.stdout.close(); sys.exit(2)", 2)]
)
def test_what_is_to_be_done_is_done_and_no_more(end: str, code: int) -> None:
    """Output is whole, functions for the end have run, the code is the program's; Python does not tidy up."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, check=False, env=BUFFERED
    )
    assert done.returncode == code
    assert done.stdout == ("said " if "close" in end else "said at exit\n")


def test_whoever_is_impatient_sees_no_more() -> None:
    """Ctrl-C once more while functions for the end run: they run on, and the code stays."""
    end = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    end += "atexit.register(signal.raise_signal, signal.SIGINT); sys.exit(3)"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, check=False, env=BUFFERED
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "said at exit\n", "")


def test_a_bug_keeps_its_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end="1 / 0")], capture_output=True, text=True, check=False, env=BUFFERED
    )
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert done.stdout == "said at exit\ntidied up\n"


def test_a_last_word_is_said() -> None:
    """As Python does; and an output that cannot be written is no success."""
    command = [sys.executable, "-c", PROGRAM.format(end="sys.exit('in vain')")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=BUFFERED)
    assert (done.returncode, done.stderr) == (1, "in vain\n")
    with open("/dev/full", "w") as full:  # noqa: PTH123  # no path
        command = [sys.executable, "-c", PROGRAM.format(end="pass")]
        assert subprocess.run(command, stdout=full, check=False, env=BUFFERED).returncode == 120
