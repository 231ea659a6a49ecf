"""What holds a worker back: throttling, reclaim, the OOM killer, stalls. By its group's counters, for the node."""

from __future__ import annotations

from typing import Final

from llmosd.kernel.spec import Limits
from llmosd.node.counters import Counters

#: A worker that was throttled for a smaller share of the time is not said to be.
THROTTLED_SHARE: Final = 0.1
#: Likewise for the share of the last ten seconds in which some of its tasks stood still for want of a resource.
STALLED_SHARE: Final = 0.4
#: The limits by which a group can be held back. Without any of them nobody reads its counters.
_LIMITS: Final = ("cpu_quota", "memory_high", "memory_max", "swap_max")


class Strain:
    """One life's strain, from look to look."""

    def __init__(self) -> None:
        self._last = Counters()
        self._last_at = 0.0
        #: What holds it back now, as a sentence; empty: nothing.
        self.why = ""

    def update(self, counters: Counters, limits: Limits, now: float) -> bool:
        """Look at the counters; whether `why` has changed. `now` is in monotonic seconds."""
        found = strains(self._last, counters, now - self._last_at, limits) if self._last_at else {}
        self._last, self._last_at = counters, now
        why = "; ".join(found.values())
        has_changed, self.why = why != self.why, why
        return has_changed

    @property
    def oom_kills(self) -> int:
        """Processes that the OOM killer had taken by the last look."""
        return self._last.oom_kills


def may_strain(limits: Limits) -> bool:
    """Whether these limits can hold a worker back."""
    return any(getattr(limits, name) is not None for name in _LIMITS)


def strains(before: Counters, now: Counters, elapsed_s: float, limits: Limits) -> dict[str, str]:
    """What holds a worker back, by kind, as sentences. `before`: the counters `elapsed_s` seconds ago."""
    found: dict[str, str] = {}
    if elapsed_s > 0 and now.throttled_s is not None and before.throttled_s is not None:
        share = (now.throttled_s - before.throttled_s) / elapsed_s
        if limits.cpu_quota is not None and share >= THROTTLED_SHARE:
            # Summed over its tasks, so above 1 where several were held back at once.
            found["throttled"] = f"throttled by cpu_quota, which is {limits.cpu_quota}"
    if limits.memory_high is not None and now.over_high > before.over_high:
        found["slowed"] = f"slowed down to give memory back: above memory_high, which is {limits.memory_high}"
    if now.oom_kills > before.oom_kills:
        found["oom"] = out_of_memory(now.oom_kills - before.oom_kills, limits)
    for resource in ("memory", "io"):  # waiting for a CPU is not yet a fault of anybody's
        if (share := now.stalled.get(resource, 0.0)) >= STALLED_SHARE:
            found[f"{resource} pressure"] = f"stalled for want of {resource} {share:.0%} of the time"
    return found


def out_of_memory(count: int, limits: Limits) -> str:
    """A sentence for processes that the OOM killer took."""
    what = "a process was" if count == 1 else f"{count} processes were"
    bound = "the machine has no more" if limits.memory_max is None else f"memory_max is {limits.memory_max}"
    return f"out of memory: {what} killed by the OOM killer; {bound}"
