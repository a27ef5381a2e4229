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

__all__ = [
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
]


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
