"""The node by itself, with a confinement that only tells what it is asked for."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.ledger import Grant
from llmosd.kernel.spec import Command, Limits, ModelSpec
from llmosd.launch.gate import Order
from llmosd.node import records
from llmosd.node.confine import LaunchSettings
from llmosd.node.confine.choice import Maker
from llmosd.node.life import Program
from llmosd.node.logwriter import LogWriter
from llmosd.node.marked import MarkedGroups
from llmosd.node.node import Node
from llmosd.node.usage import Usage

#: Seconds: what does not happen within it would not have happened.
PATIENCE_S = 0.5


class Slow:
    """Its first change takes until another begins, or so long that none can have been waiting to."""

    name = "slow"

    def __init__(self) -> None:
        self.told: list[str] = []
        self.another = threading.Event()

    def beside(self, held: frozenset[str]) -> Slow:
        return self

    def check(self, limits: Limits) -> None: ...

    def enforcement(self, limit: str) -> str:
        return self.name

    def launch_settings(self, limits: Limits) -> LaunchSettings:
        return LaunchSettings()

    def over_limit(self, limits: Limits, usage: Usage) -> str:
        return ""

    def apply(self, pids: Sequence[int], limits: Limits, before: Limits | None = None) -> list[str]:
        self.told.append(f"{limits.nice} begins")
        if len(self.told) == 1:
            self.another.wait(PATIENCE_S)
        self.another.set()
        self.told.append(f"{limits.nice} is done")
        return []


def test_changes_of_limits_are_made_and_recorded_one_after_another_in_their_order(tmp_path: Path) -> None:
    """Else what was asked for first may be what is in force in the end, and what the next daemon believes."""

    async def run() -> None:
        events: asyncio.Queue[on.Event] = asyncio.Queue()
        order = Order(argv=("sleep", "1000"), env=dict(os.environ))
        logs = LogWriter(tmp_path, tmp_path / "logs.sock", 1 << 20, to_journal=False, warn=print)
        node = Node(
            "llmosd-test", Maker(slow, MarkedGroups("llmosd-test")), tmp_path, logs, events.put_nowait,
            lambda worker, what: None,
            lambda effect, birth, confinement: Program(order),
        )  # fmt: skip
        node.open()
        node.spawn(do.Spawn("m@1", 1, ModelSpec(model="m", engine=Command(command=("sleep",))), Limits(), Grant()))
        assert isinstance(await events.get(), on.Spawned)
        for nice in (1, 2):
            node.confine(do.Confine("m@1", 1, Limits(nice=nice), Grant(nice * 1000)))
        end = asyncio.get_running_loop().time() + 30
        while len(slow.told) < 4:
            assert asyncio.get_running_loop().time() < end
            await asyncio.sleep(0.01)
        record = records.read(records.path_of(tmp_path / "workers", "m@1"))
        node.kill_group(do.KillGroup("m@1", 1))
        while not isinstance(await events.get(), on.Emptied):
            pass
        await node.close()
        assert slow.told == ["1 begins", "1 is done", "2 begins", "2 is done"]
        assert (record.limits, record.grant) == (msgspec.structs.replace(Limits(), nice=2), Grant(2000))

    slow = Slow()
    asyncio.run(asyncio.wait_for(run(), 60))
