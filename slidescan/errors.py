"""Every error slidescan raises on purpose.

::

    SlidescanError
    ├─ ConfigError (ValueError)              a setting is unknown or out of range
    ├─ SlideError
    │  ├─ SlideNotFoundError (FileNotFoundError)
    │  ├─ SlideFormatError (ValueError)      not a slide, damaged, or unsafe to open
    │  │  └─ SlideUnsupportedError           a slide, but of a kind that is not read
    │  ├─ SlideReadError (OSError)           opened, but pixels cannot be had
    │  └─ ResolutionError (ValueError)       µm/px missing, implausible or too coarse
    ├─ ModelError (RuntimeError)             weights, device or model directory
    │  └─ WorkerError                        a worker process, or the cluster, died
    │     └─ WorkerTimeoutError              it was ended because it took too long
    ├─ ResultError (RuntimeError)            a result directory is missing, damaged or in the way
    │  ├─ ResultBusyError                    another scan is writing there
    │  │  └─ ResultLeasedError               on another machine, now or a moment ago
    │  └─ ResultInTheWayError                it holds another scan's result
    └─ MissingExtraError (ImportError)       an optional package is not installed

A message is one line and gives the name, what was expected, what came and what to do.
Each takes exactly that one message, so that it survives the trip between Dask workers by pickle.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "OUT_OF_MEMORY",
    "ConfigError",
    "MissingExtraError",
    "ModelError",
    "ResolutionError",
    "ResultBusyError",
    "ResultError",
    "ResultInTheWayError",
    "ResultLeasedError",
    "SlideError",
    "SlideFormatError",
    "SlideNotFoundError",
    "SlideReadError",
    "SlideUnsupportedError",
    "SlideWarning",
    "SlidescanError",
    "WorkerError",
    "WorkerTimeoutError",
    "ends_in_a_line",
    "is_short_of_memory",
]

OUT_OF_MEMORY = "there was not enough memory; a smaller tiling.region_px or detect.batch_tiles may help"


class SlidescanError(Exception):
    """Any failure that slidescan foresaw; its text is one line for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)

    def __str__(self) -> str:
        """Return the message on one line, whatever a wrapped error put into it."""
        return " ".join(str(self.args[0]).split()) if self.args else ""


class SlideWarning(UserWarning):
    """The slide is read, but not as was hoped."""


class ConfigError(SlidescanError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class SlideError(SlidescanError):
    """Something about the slide itself."""


class SlideNotFoundError(SlideError, FileNotFoundError):
    """No slide at this path."""


class SlideFormatError(SlideError, ValueError):
    """The file is not a slide, is damaged beyond opening, or is unsafe to open."""


class SlideUnsupportedError(SlideFormatError):
    """The file is a slide, but of a kind that is not read."""


class SlideReadError(SlideError, OSError):
    """The slide opened but its pixels cannot be read."""


class ResolutionError(SlideError, ValueError):
    """The slide's µm/px is missing, implausible, or too coarse for the detector."""


class ModelError(SlidescanError, RuntimeError):
    """A detector cannot be loaded or run."""


class WorkerError(ModelError):
    """A worker process died over a task, or the cluster is gone."""


class WorkerTimeoutError(WorkerError):
    """A worker process was ended because it took too long."""


class ResultError(SlidescanError, RuntimeError):
    """A result directory is missing, damaged, unfinished, or in the way."""


class ResultBusyError(ResultError):
    """Another scan is writing to the result directory."""


class ResultLeasedError(ResultBusyError):
    """A scan on another machine is writing to the result directory, or was a moment ago."""


class ResultInTheWayError(ResultError):
    """The directory holds a result of other settings, or one that cannot be read."""


class MissingExtraError(SlidescanError, ImportError):
    """An optional dependency is needed and not installed."""


def is_short_of_memory(error: Exception) -> bool:
    """Return whether memory ran out: numpy's, a GPU's, or torch's on the CPU, which has no error of its own."""
    name = type(error).__name__
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or "not enough memory" in str(error)


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
