"""What an archive has to do: the list in its order, what is to be tried again when its time has come, suspects last."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterable, Iterator

from slidescan.archive.slide import SlideTask

__all__ = ["Worklist"]


class Worklist:
    """Slides to do.

    A slide that kills its worker takes with it what others have in flight there, and they look as guilty as it is. So
    each is tried alone once nothing else is left: the innocent ones are done then.
    """

    def __init__(self, tasks: Iterable[SlideTask]) -> None:
        self._first = deque(tasks)
        self._later: list[tuple[float, int, SlideTask]] = []
        self._suspects: deque[SlideTask] = deque()
        self._n = 0

    def __len__(self) -> int:
        return len(self._first) + len(self._later) + len(self._suspects)

    @property
    def only_suspects(self) -> bool:
        """Whether nothing is left but what is to be tried alone."""
        return not self._first and not self._later

    def __iter__(self) -> Iterator[SlideTask]:
        yield from self._first

    def due(self) -> SlideTask | None:
        """Take the next one that may begin now."""
        if self._later and self._later[0][0] <= time.monotonic():
            return heapq.heappop(self._later)[2]
        return self._first.popleft() if self._first else None

    def later(self, task: SlideTask, wait_s: float) -> None:
        """Put a slide back for some time."""
        heapq.heappush(self._later, (time.monotonic() + wait_s, self._n, task))
        self._n += 1

    def alone(self, task: SlideTask) -> None:
        """Put a suspect back."""
        self._suspects.append(task)

    def suspect(self) -> SlideTask | None:
        """Take the next suspect."""
        return self._suspects.popleft() if self._suspects else None

    def wait(self) -> None:
        """Wait for the next one, when nothing else is left."""
        if not self._first and self._later:
            time.sleep(max(0.0, self._later[0][0] - time.monotonic()))
