"""The loop around the kernel: events in, one at a time; effects out, each to the part whose work it is; a timer.

Nothing here decides anything. A fault of ours costs one event or one effect, never the workers and everybody's
requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.kernel import Kernel

log = logging.getLogger("llmosd")


class KernelLoop:
    """Feeds a kernel. `carriers` must be set before the first event."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        #: Who carries out which effect.
        self.carriers: Mapping[type[do.Effect], Callable[[Any], None]] = {}
        #: Events and effects that were lost to a fault of ours.
        self.faults = 0
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[on.Event] = deque()
        self._handling = False
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0

    def feed(self, event: on.Event) -> None:
        """Give the kernel an event and carry out what it answers. What that causes waits its turn: one at a time."""
        self._inbox.append(event)
        if self._handling:
            return
        self._handling = True
        while self._inbox:
            one = self._inbox.popleft()
            try:
                effects = self.kernel.handle(one, time.monotonic())
            except Exception:
                log.exception("the kernel failed on %s", type(one).__name__)
                self.faults += 1
                continue
            for effect in effects:
                try:
                    self.carriers[type(effect)](effect)
                except Exception:
                    log.exception("%s could not be carried out", type(effect).__name__)
                    self.faults += 1
        self._handling = False
        self._arm()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        due = self.kernel.deadline()
        if due is None:
            return
        # An early tick is harmless and cheaper than a new timer for each event.
        when = self._loop.time() + max(0.0, due - time.monotonic())
        if self._timer is not None:
            # Not the handle's own `when`: uvloop's for a moment that is now has none.
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.feed(on.Tick())
