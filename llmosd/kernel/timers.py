"""Deadlines, earliest first. Pure; for the kernel."""

from __future__ import annotations

import heapq
from collections.abc import Hashable


class Timers:
    """At most one deadline a key. Setting a key again replaces its deadline; the old heap entry is skipped later."""

    def __init__(self) -> None:
        self._due: dict[Hashable, float] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._count = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._due

    def set(self, key: Hashable, due: float) -> None:
        if self._due.get(key) == due:
            return
        self._due[key] = due
        self._count += 1
        heapq.heappush(self._heap, (due, self._count, key))

    def arm(self, key: Hashable, due: float) -> None:
        """Set a deadline unless the key has one: for timers that look again for themselves when they ring."""
        if key not in self._due:
            self.set(key, due)

    def cancel(self, key: Hashable) -> None:
        self._due.pop(key, None)

    def pop_due(self, now: float) -> Hashable | None:
        """One key whose deadline has passed, or None. It is no longer set."""
        self._drop_stale()
        if self._heap and self._heap[0][0] <= now:
            key = heapq.heappop(self._heap)[2]
            del self._due[key]
            return key
        return None

    def earliest(self) -> float | None:
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def _drop_stale(self) -> None:
        heap, due = self._heap, self._due
        while heap and due.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)
        if len(heap) > 64 and len(heap) > 4 * len(due):
            live = [entry for entry in heap if due.get(entry[2]) == entry[0]]
            heapq.heapify(live)
            self._heap = live
