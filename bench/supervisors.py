"""What the benchmark of supervision asks of a supervisor, and llmosd as one. The peers are in `peer_supervisors`.

Each supervises the same `Program`s, configured as its own documentation does it: what is not written here is its
default. A tuned variant changes the settings that somebody would change who minds the defaults, and names them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Protocol

import msgspec

import llmos
from bench.machine import Machine, wait_for

#: Seconds from SIGTERM to SIGKILL, for all of them: how patient an operator is, not what a supervisor costs.
STOP_S: Final = 2


class Program(msgspec.Struct, frozen=True):
    """What is to be kept running. Neither its name nor its command may hold what a configuration file would expand."""

    name: str
    command: tuple[str, ...]
    count: int = 1


class Supervisor(Protocol):
    """One of the three, in a directory of its own."""

    @property
    def pid(self) -> int: ...

    def launch(self) -> None:
        """Start it with its programs, as a service manager would, and return at once."""

    def answers(self) -> bool:
        """Whether it can be asked; connects if need be."""

    def running(self, program: str) -> set[int]:
        """Process ids of those that it shows as running: past whatever it counts as starting."""

    def start(self, program: str) -> None:
        """Send the request over a connection that is open."""

    def stop(self, program: str) -> None:
        """Returns once it says that the program is stopped."""

    def crash(self) -> None:
        """SIGKILL, as an OOM killer would."""

    def close(self) -> None:
        """End it, and with it what it supervises."""


class Llmosd:
    """A model file for each program, of `kind = "service"`."""

    # No bound on the number of starts, and no growing back-off, in either: a benchmark kills more often than a fault.
    TUNED = 'restart.delay = "0s"'

    def __init__(self, root: Path, programs: list[Program], *, tuned: bool = False) -> None:
        self._machine = Machine(root)
        self._client: llmos.Client | None = None
        for program in programs:
            self._machine.model(
                program.name,
                f"""kind = "service"
[engine]
driver = "command"
command = {json.dumps(program.command)}
[scale]
min = {program.count}
max = {program.count}
[restart]
policy = "always"
burst = 0
reset_after = "100ms"
{'delay = "0s"' if tuned else ""}
[timeouts]
stop = "{STOP_S}s"
""",
            )

    @property
    def pid(self) -> int:
        return self._machine.pid

    def launch(self) -> None:
        self._machine.launch()

    def answers(self) -> bool:
        if not self._machine.answers():
            return False
        if self._client is None:
            self._client = self._machine.client()
        return True

    def running(self, program: str) -> set[int]:
        return {worker.pid for worker in self._ask().ps(program) if worker.state == "ready"}

    def start(self, program: str) -> None:
        self._ask().start(program)

    def stop(self, program: str) -> None:
        self._ask().stop(program)
        wait_for(f"stopped {program}", lambda: not self._ask().ps(program))

    def crash(self) -> None:
        self._disconnect()
        self._machine.kill()

    def close(self) -> None:
        self._disconnect()
        self._machine.close()

    def _ask(self) -> llmos.Client:
        assert self._client is not None
        return self._client

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
