"""Where the time of a scan goes: seconds by stage, of every thread that did regions.

A thread is in one stage at a time: a stage entered inside another one pauses it, so the seconds of a thread add up to
the time it was there. What a thread spent stays with it until `taken` hands it out.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

__all__ = ["SCORING", "Profile", "spent", "stage", "taken"]

# In the order pixels go through them, with what a person wants to know of each.
_STAGES = {
    "read": "bytes from the file",
    "decode": "to pixels (through OpenSlide and Zarr with their reading)",
    "assemble": "to one region: place, resample, colour",
    "wait": "for the model, which another region had",
    "load": "the network, once a process",
    "batch": "tiles cut from the region",
    "transfer": "to the device",
    "model": "detections from tiles",
    "write": "the region's part",
}
_READING = ("read", "decode", "assemble")
SCORING = ("batch", "transfer", "model")  # in which the model is busy


class _Clock(threading.local):
    """What this thread spent, and what it is at."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.at: list[str] = []
        self.since = 0.0


_clock = _Clock()


class stage:  # lower case: it reads as a word of the code it times
    """Count the seconds of a ``with`` block to a stage of this thread.

    Examples
    --------
    >>> _ = taken()
    >>> with stage("assemble"), stage("decode"):
    ...     pass
    >>> sorted(taken())
    ['assemble', 'decode']
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._turn()
        _clock.at.append(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turn()
        _clock.at.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if _clock.at:
            _clock.seconds[_clock.at[-1]] += now - _clock.since
        _clock.since = now


def spent(name: str, seconds: float) -> None:
    """Count seconds of the stage this thread is in to another one: for what happens too often for a block of its own.

    Examples
    --------
    >>> _ = taken()
    >>> with stage("assemble"):
    ...     spent("decode", 3.0)
    >>> taken()["decode"]
    3.0
    """
    _clock.seconds[name] += seconds
    _clock.since += seconds


def taken() -> dict[str, float]:
    """Return the seconds this thread spent by stage since it was last asked."""
    seconds, _clock.seconds = _clock.seconds, defaultdict(float)
    return dict(seconds)


@dataclass(slots=True)
class Profile:
    """What became of the time in which regions were done.

    Parameters
    ----------
    threads : int
        Regions done at once.
    scoring : int
        Regions scored at once.
    regions, megapixels
        Done in this run, megapixels of the model's plane.
    wall_s : float
        From the first region handed out to the last one back.
    thread_s : dict
        Seconds by stage, summed over threads.

    Examples
    --------
    >>> profile = Profile(2, 1, 10, 160.0, 20.0, {"decode": 8.0, "model": 19.0, "wait": 11.0})
    >>> profile.reads_mp_s, round(profile.scores_mp_s, 1), round(profile.share_of_slower, 2)
    (40.0, 8.4, 0.95)
    """

    threads: int
    scoring: int
    regions: int = 0
    megapixels: float = 0.0
    wall_s: float = 0.0
    thread_s: dict[str, float] = field(default_factory=dict)

    def add(self, megapixels: float, seconds: Mapping[str, float]) -> None:
        """Count one region."""
        self.regions, self.megapixels = self.regions + 1, self.megapixels + megapixels
        for name, value in seconds.items():
            self.thread_s[name] = self.thread_s.get(name, 0.0) + value

    def told(self) -> dict[str, Any]:
        """Return it as it stands in a manifest."""
        return {
            "threads": self.threads,
            "scoring": self.scoring,
            "regions": self.regions,
            "megapixels": round(self.megapixels, 3),
            "wall_s": round(self.wall_s, 3),
            "thread_s": {name: round(self.thread_s[name], 3) for name in _STAGES if name in self.thread_s},
        }

    @property
    def reads_mp_s(self) -> float:
        """Megapixels a second if all threads only read."""
        return self._rate(_READING, self.threads)

    @property
    def scores_mp_s(self) -> float:
        """Megapixels a second if the model never waited."""
        return self._rate(SCORING, self.scoring)

    @property
    def share_of_slower(self) -> float:
        """What the scan reached of the slower of the two."""
        slower = min(self.reads_mp_s, self.scores_mp_s)
        return self.megapixels / self.wall_s / slower if self.wall_s and slower else 0.0

    def lines(self) -> list[str]:
        """Return the table a person reads."""
        if not self.regions:
            return ["profile     nothing was scored in this run"]
        total = sum(self.thread_s.values())
        regions = f"{self.regions:,} region{'' if self.regions == 1 else 's'}"
        table = [f"profile     {regions}, {self.megapixels:,.1f} MP in {self.wall_s:.1f} s"]
        for name, what in _STAGES.items():
            if name in self.thread_s:
                seconds = self.thread_s[name]
                table.append(f"  {name:<9} {seconds:9.1f} s  {seconds / total:6.1%}  {what}")
        slower = "the model" if self.scores_mp_s <= self.reads_mp_s else "reading"
        table.append(
            f"  reading alone {self.reads_mp_s:,.1f} MP/s ({self.threads} threads), the model alone "
            f"{self.scores_mp_s:,.1f} MP/s; the scan ran at {self.share_of_slower:.0%} of the slower, {slower}"
        )
        return table

    def _rate(self, stages: tuple[str, ...], at_once: int) -> float:
        seconds = sum(self.thread_s.get(name, 0.0) for name in stages) / at_once
        return self.megapixels / seconds if seconds else float("inf")
