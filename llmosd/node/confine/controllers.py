"""The `systemd` and `cgroup` makers: what a group's controllers hold is theirs, the rest is done process by process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from llmosd.kernel.spec import Limits
from llmosd.node.confine import Confinement, LaunchSettings
from llmosd.node.confine.process import disks_that_weigh
from llmosd.node.usage import Usage


class ControllerConfinement:
    """See the module. The group itself is told by whoever changes limits (`Group.limit`)."""

    def __init__(self, name: str, held: frozenset[str], rest: Confinement) -> None:
        """`held`: the limits that the groups' controllers hold; `rest` sees to the others."""
        self.name = name
        self._held: Final = held
        self._rest = rest

    def beside(self, held: frozenset[str]) -> Confinement:
        if held == self._held:
            return self
        return ControllerConfinement(self.name, held, self._rest) if held else self._rest

    def check(self, limits: Limits) -> None:
        # Which CPUs there are is the same question, whoever holds a worker to them.
        self._rest.check(msgspec.structs.replace(self._without(limits), allowed_cpus=limits.allowed_cpus))

    def enforcement(self, limit: str) -> str:
        return self.name if limit in self._held else self._rest.enforcement(limit)

    def launch_settings(self, limits: Limits) -> LaunchSettings:
        return self._rest.launch_settings(self._without(limits))

    def apply(self, pids: Sequence[int], limits: Limits, before: Limits | None = None) -> list[str]:
        return self._rest.apply(pids, self._without(limits), None if before is None else self._without(before))

    def over_limit(self, limits: Limits, usage: Usage) -> str:
        return self._rest.over_limit(self._without(limits), usage)

    def _without(self, limits: Limits) -> Limits:
        return msgspec.structs.replace(limits, **dict.fromkeys(self._held))


def io_is_weighed(root: Path = Path("/")) -> bool:
    """Whether any disk shares its time by weight: by bfq, or by the cost model (cgroup-v2.rst, io.cost.qos)."""
    try:
        by_cost = "enable=1" in (root / "sys/fs/cgroup/io.cost.qos").read_text()
    except OSError:
        by_cost = False
    return by_cost or bool(disks_that_weigh(root))
