"""How a program ends: with a line for a person, and an exit code for a script."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from slidescan.errors import ResultError, SlideError, SlidescanError, WorkerError

__all__ = [
    "OUT_OF_MEMORY",
    "ends_at_once",
    "ends_in_a_line",
    "heeded_signals",
    "is_short_of_memory",
    "lost_device",
]

OUT_OF_MEMORY = "there was not enough memory; a smaller tiling.region_px, or on a GPU tiling.tile_px, may help"

_AGAIN_S = 0.05  # after which a signal that was lost comes again: finalizers end sooner
_UNSAID = 120  # Python's own exit code where its output could not be written
# What a GPU's driver and its libraries say, torch and Triton around them: of memory, and of anything else.
_NO_MEMORY = ("not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
_OF_DEVICE = ("CUDA error", "HIP error", "CUBLAS_STATUS", "CUDNN_STATUS", "Triton Error [")


def is_short_of_memory(error: Exception) -> bool:
    """Return whether memory ran out: numpy's, a GPU's, or torch's on the CPU, which has no error of its own."""
    name, said = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or any(text in said for text in _NO_MEMORY)


def lost_device(error: Exception) -> str:
    r"""Return what a GPU's driver said of an error after which it does nothing more for this process; "" if it is none.

    Examples
    --------
    >>> lost_device(RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ..."))
    'CUDA error: unspecified launch failure'
    >>> lost_device(ValueError("expected a number"))
    ''
    """
    said = " ".join(str(error).partition("\n")[0].split())
    is_of_device = type(error).__name__ == "AcceleratorError" or any(text in said for text in _OF_DEVICE)
    return said if is_of_device and not is_short_of_memory(error) else ""


@contextmanager
def ends_in_a_line(program: str, stopped: str = "stopped") -> Iterator[None]:
    """End the program with one line on stderr where the block ends in a foreseen failure or, as `stopped`, by Ctrl-C.

    The exit code is 1 where the slide (or file) is at fault, 2 where the command, a setting or the model is, and 3
    where it stopped before the end.
    """
    try:
        yield
    except SlidescanError as exc:
        code = 1 if isinstance(exc, SlideError) else 3 if isinstance(exc, ResultError | WorkerError) else 2
        said = str(exc)
    except KeyboardInterrupt:
        said, code = stopped, 3
    except Exception as exc:
        if not is_short_of_memory(exc):  # a bug, which keeps its traceback
            raise
        said, code = OUT_OF_MEMORY, 3
    else:
        return
    sys.stderr.write(f"{program}: {said}\n")
    sys.exit(code)


@contextmanager
def heeded_signals() -> Iterator[None]:
    """Make a queue's polite end the user's Ctrl-C while the block runs, and lose neither.

    Python drops what is raised inside a finalizer or a callback of a weak reference, KeyboardInterrupt, too, and the
    run would go on. It is raised again a moment later, until it comes where it can be raised.
    """
    told = sys.unraisablehook

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            told(dropped)

    before = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGTERM, signal.SIGALRM)}
    sys.unraisablehook = again
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = told
        for each, handler in before.items():
            signal.signal(each, handler)


def ends_at_once(main: Callable[[], None]) -> NoReturn:
    """Run a program's `main` and end with its exit code, but without Python's own tidying up.

    Where torch and transformers are loaded it takes a second, and nothing is left to tidy up once the functions
    registered for the end have run; threads are not waited for. A bug keeps its traceback, and ends as Python ends.
    """
    code: object = None
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    if isinstance(code, str):  # as Python has it
        sys.stderr.write(f"{code}\n")
        code = 1
    status = code if isinstance(code, int) else 0
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever presses Ctrl-C again has been told that it ends
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except OSError:
        status = status or _UNSAID
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(status)
