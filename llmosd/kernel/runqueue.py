"""The queue of requests that wait for a slot of one model: first come, first served, and bounded. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from llmosd.kernel.requests import Request


class RunQueue:
    """Ordered by `Request.order`, so that a request that comes back takes its old place."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, bytes]] = []
        self._waiting: dict[bytes, Request] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        """In no particular order."""
        return iter(self._waiting.values())

    def push(self, request: Request) -> None:
        self._waiting[request.rid] = request
        heapq.heappush(self._heap, (request.order, request.rid))

    def pop(self) -> Request | None:
        """The request that is next, taken out; None when nobody waits."""
        while self._heap:
            order, rid = heapq.heappop(self._heap)
            request = self._waiting.get(rid)
            if request is not None and request.order == order:
                del self._waiting[rid]
                return request
        return None

    def remove(self, rid: bytes) -> None:
        """Take a request out, wherever it stands. Its heap entry is skipped later, or swept."""
        if self._waiting.pop(rid, None) is not None and len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self._waiting]
            heapq.heapify(self._heap)
