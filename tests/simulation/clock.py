"""Virtual time: a heap of what is to happen. One seed gives one history, on any machine."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any


class Clock:
    """The time, the future, and chance."""

    def __init__(self, seed: int) -> None:
        self.now = 1000.0
        self.chance = random.Random(seed)
        self._future: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, seconds: float, what: Callable[..., object], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._future, (self.now + max(0.0, seconds), self._count, what, args))

    def advance(self) -> None:
        """Let the next thing happen."""
        self.now, _, what, args = heapq.heappop(self._future)
        what(*args)

    def happens(self, probability: float) -> bool:
        return probability > 0 and self.chance.random() < probability

    def between(self, low: float, high: float) -> float:
        return self.chance.uniform(low, high)
