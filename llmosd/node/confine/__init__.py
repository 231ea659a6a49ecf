"""Confinement: keeping a worker within its limits. The interface that each maker fulfils.

A maker is chosen once, at start, by what the machine has. It is honest: `enforcement` says for each limit who sees to
it, and a limit that nobody can see to is refused by `check`, never silently accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from llmosd.kernel.spec import Limits
from llmosd.node.usage import Usage


class Unenforceable(Exception):  # noqa: N818  # what it says of a limit; it is an answer, not a fault
    """A limit that this machine can neither enforce nor watch. The text is a sentence for the one who asked for it."""

    def __init__(self, limit: str, reason: str) -> None:
        super().__init__(f"{limit} {reason}")
        self.limit = limit
        self.reason = reason


class LaunchSettings(msgspec.Struct, frozen=True):
    """What the launcher applies to a child before it runs its program. None: as the daemon has it."""

    cpu_affinity: tuple[int, ...] | None = None
    nice: int | None = None
    #: Class and level, as in ioprio_set(2).
    ionice: tuple[int, int] | None = None
    #: (soft, hard) by the name after `RLIMIT_`.
    rlimits: dict[str, tuple[int, int]] = {}
    oom_score_adj: int | None = None


class Confinement(Protocol):
    """Makes limits hold for a worker's process tree. Calls may block a little: they belong in a thread."""

    @property
    def name(self) -> str:
        """As it shows in `llmos limits`."""

    def beside(self, held: frozenset[str]) -> Confinement:
        """Who sees to the limits of a worker whose group holds just these: an earlier daemon's may hold others."""

    def check(self, limits: Limits) -> None:
        """Raise Unenforceable for the first limit that this machine can neither enforce nor watch."""

    def enforcement(self, limit: str) -> str:
        """Who sees to a limit: this maker by its name, "watched" for what is looked at from time to time and answered
        with a kill, "llmosd" for what the kernel does itself; "" if nobody can."""

    def launch_settings(self, limits: Limits) -> LaunchSettings:
        """What a new worker begins with."""

    def apply(self, pids: Sequence[int], limits: Limits, before: Limits | None = None) -> list[str]:
        """Put limits in force on a tree that runs: `pids`, the leader first, and all their descendants.

        `before`: the limits in force until now. Only what differs is touched, so that what an engine arranged for
        itself stays, and a limit that became None is lifted. Without it, every limit that is set is applied.
        Answers what could not be done, as sentences.
        """

    def over_limit(self, limits: Limits, usage: Usage) -> str:
        """Which watched limit `usage` passes, as a sentence, or "". See `usage.sample` for a second, exact look."""
