"""What a client that follows must decide: whether those it waits for have arrived, what it has seen already. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from llmos.errors import WorkerFailed
from llmos.types import Worker

#: Lines of a log that are remembered, and asked for again after a cut, to find the place.
OVERLAP_LINES: Final = 100
#: States from which a worker that is awaited will not come by itself.
DEAD_ENDS: Final = frozenset({"failed", "unkillable"})
_ENDS: Final = {"failed": "has failed", "backoff": "ended and will be tried again", "stopped": "has stopped"}


def arrived(
    wanted: Collection[str], workers: Sequence[Worker], states: Collection[str], dead_ends: Collection[str]
) -> bool:
    """Whether all of `wanted`, workers' or models' names, are in one of `states`. What is not listed is stopped.

    Raises WorkerFailed when one is in a dead end.
    """
    there = True
    for name in wanted:
        found = [worker for worker in workers if name in (worker.name, worker.model)]
        if not found:
            there = there and "stopped" in states
            if "stopped" in dead_ends and "stopped" not in states:
                raise WorkerFailed(f"{name} is not there any more. See `llmos events`.", name, "stopped")
        for worker in found:
            if worker.state in states:
                continue
            there = False
            if worker.state in dead_ends:
                why = f": {worker.why}" if worker.why else ""
                end = _ENDS.get(worker.state, f"is {worker.state}")
                message = f"{worker.name} {end}{why}. See `llmos logs {worker.name}`."
                raise WorkerFailed(message, worker.name, worker.state)
    return there


def where(workers: Sequence[Worker]) -> str:
    """How far workers have come, in a sentence's part."""
    if not workers:
        return "none is there"
    return ", ".join(f"{w.name} is {w.state}{f' ({w.why})' if w.why else ''}" for w in workers)


class FollowedLog:
    """A log that is read from its end, and after a cut again from its end: which of its lines are news.

    Lines have no numbers, so the place is found by the overlap with the lines that came before.
    """

    def __init__(self, lines: int, follow: bool) -> None:
        """`lines`: the last lines to begin with; negative: all."""
        self._lines = lines
        self._follow = follow
        self._recent: deque[str] = deque(maxlen=OVERLAP_LINES)
        self._opened = 0
        self._fresh = False

    def reopened(self) -> int:
        """The log is read from its end, for the first time or again: how many lines to ask for."""
        self._opened += 1
        self._fresh = True
        if self._opened > 1:
            return OVERLAP_LINES
        # As many as are wanted after a cut, so that those overlap with these.
        return max(self._lines, OVERLAP_LINES) if self._follow and self._lines > 0 else self._lines

    def received(self, lines: Iterable[str]) -> list[str]:
        """Of lines that came, those to show."""
        news = list(lines)
        first, self._fresh = self._fresh, False
        if first and self._opened > 1:
            news = _unseen(self._recent, news)
        self._recent.extend(news)
        return news[-self._lines :] if first and self._opened == 1 and self._lines > 0 else news


def _unseen(seen: Iterable[str], lines: list[str]) -> list[str]:
    """Those of `lines` that come after the longest overlap with the end of `seen`."""
    before = list(seen)
    for size in range(min(len(before), len(lines)), 0, -1):
        if before[-size:] == lines[:size]:
            return lines[size:]
    return lines
