"""Whether this machine can isolate as a model's file asks: found out by doing it, to a process that does nothing.

For `apply`, `reload` and the doctor. No list of what kernels, containers and security modules forbid is as good as the
launcher itself, which goes through the same gate here as with a worker.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Final

from llmosd.isolation import Isolator, account, is_below, private_tmp
from llmosd.kernel.ledger import Grant
from llmosd.kernel.spec import Command, Isolation, ModelSpec, OpenAI
from llmosd.launch.gate import Gate, Order, SetUpError
from llmosd.node import access
from llmosd.settings import Directories

#: Says how many of the paths in its arguments it can read, up to the first that it cannot.
_READS: Final = "import os,sys\nn=0\nfor p in sys.argv[1:]:\n if not os.access(p,4): break\n n+=1\nprint(n)"
#: A change of user needs these, and what the daemon does with the worker afterwards (capabilities(7)).
_CHANGE_OF_USER: Final = {"CAP_CHOWN": 0, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8}
_CAP_SYS_ADMIN: Final = 21
#: The node ends children that it does not know, and may see one before it is noted.
_TRIES: Final = 3


class CannotIsolate(Exception):  # noqa: N818  # what this machine answers, and no fault
    """What was asked for cannot be had here: a sentence with the key, the reason and what to do."""


class IsolationCheck:
    """Asks, and remembers what was found possible."""

    def __init__(self, directories: Directories, isolator: Isolator, helpers: set[int]) -> None:
        """`helpers`: where the processes of this are noted, so that the node lets them be."""
        self._directories = directories
        self._isolator = isolator
        self._helpers = helpers
        self._possible: set[tuple[Isolation, bool]] = set()

    def remember(self, spec: ModelSpec) -> None:
        """A worker is isolated so: no doubt that it is possible."""
        self._possible.add((spec.isolation, spec.engine.hosted))

    async def check(self, spec: ModelSpec) -> None:
        """Raises CannotIsolate."""
        if spec.isolation == Isolation():
            return
        try:
            await asyncio.to_thread(self._look, spec)
            if (spec.isolation, spec.engine.hosted) not in self._possible:
                await self._try(spec)
                self.remember(spec)
        except (OSError, ValueError) as error:
            raise CannotIsolate(f"isolation: {getattr(error, 'strerror', None) or error}") from None

    async def lacking(self) -> dict[str, str]:
        """What cannot be had here, by key, with the reason: for the doctor."""
        reasons = {}
        if missing := _missing(_CHANGE_OF_USER):
            reasons["user"] = f"needs {', '.join(missing)}"
        for key, isolation in {
            "private_tmp": Isolation(private_tmp=True),
            "read_only_paths": Isolation(read_only_paths=("/usr",)),
            "no_new_privileges": Isolation(no_new_privileges=True),
            "private_network": Isolation(private_network=True),
            "device_policy": Isolation(device_policy="closed"),
        }.items():
            try:
                await self.check(ModelSpec(model="doctor", engine=Command(command=("true",)), isolation=isolation))
            except CannotIsolate as error:
                reasons[key] = str(error).removeprefix("isolation: ")
        return reasons

    def _look(self, spec: ModelSpec) -> None:
        """What can be told without trying, with better words. Raises OSError or ValueError."""
        isolation = spec.isolation
        for path in isolation.read_only_paths:
            if not Path(path).exists():
                raise ValueError(f"read_only_paths: {path} does not exist; make it, or leave it out")
        if isinstance(spec.engine, Command | OpenAI):
            program = Path(spec.engine.command[0])
            hidden = program.is_absolute() and is_below(str(program.resolve()), private_tmp(isolation))
            if hidden and not is_below(str(program), self._isolator.needed(spec)):
                raise ValueError(f"private_tmp: the worker could not see its own program, {program}; put it elsewhere")
        if not isolation.user:
            return
        user = account(isolation.user).user
        if missing := _missing(_CHANGE_OF_USER):
            raise ValueError(f"user: llmosd has no {', '.join(missing)}; run it as root, or leave `user` out")
        self._isolator.admit(isolation)
        order = self._order(spec)
        if order.namespaces is not None and _missing({"": _CAP_SYS_ADMIN}):
            closed = [path for path, mode in order.namespaces.private if mode != 0o1777]
            why = f"{closed[0]} is closed to {isolation.user}" if closed else "it is to have a user and namespaces"
            raise ValueError(f"user: {why}, for which llmosd needs CAP_SYS_ADMIN")
        for file in self._isolator.named(spec):
            if not access.may(file, user, access.READ):
                raise ValueError(f"user: {isolation.user} may not read {file}; allow it with chmod or setfacl")

    def _order(self, spec: ModelSpec) -> Order:
        paths = self._isolator.vital(spec)
        argv = (sys.executable, "-I", "-S", "-c", _READS, *paths) if paths else ("true",)
        order = Order(argv=argv, env={"PATH": os.environ.get("PATH", os.defpath)}, cwd="/")
        return self._isolator.isolate(order, spec, Grant(), self._directories.runtime / "scratch")

    async def _try(self, spec: ModelSpec) -> None:
        """Launch a process as the worker would be. Raises OSError or ValueError."""
        order = await asyncio.to_thread(self._order, spec)
        paths = self._isolator.vital(spec)
        said = ""
        for _ in range(_TRIES):
            try:
                said = await self._output(order)
            except SetUpError as error:
                if error.step == "gate":
                    continue
                who = f" as user {spec.isolation.user}" if spec.isolation.user else ""
                what = f"cannot run {order.argv[0]}{who}" if error.step == "exec" else error.step
                raise ValueError(f"{what}: {error}") from None
            if not paths:
                return
            if said:
                break
        if not said:
            raise ValueError("a process that was isolated so was killed before it could say anything; try again")
        if (readable := int(said)) < len(paths):
            who = spec.isolation.user or "the worker"
            raise ValueError(f"user: {who} may not read {paths[readable]}, which a worker needs; allow it with chmod")

    async def _output(self, order: Order) -> str:
        """What a process says that is launched and left to end. Raises OSError or SetUpError."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            gate = Gate.spawn(stdin=null, stdout=write_end, stderr=null)
        except OSError:
            os.close(read_end)
            raise
        finally:
            os.close(null)
            os.close(write_end)
        self._helpers.add(gate.pid)
        try:
            await gate.go(order)
        finally:
            said = await asyncio.to_thread(_read_to_the_end, read_end, gate.pidfd)
            self._helpers.discard(gate.pid)
        return said


def _read_to_the_end(pipe: int, pidfd: int) -> str:
    with os.fdopen(pipe) as file:
        said = file.read()
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        pass  # the node's look for orphans has reaped it
    os.close(pidfd)
    return said.strip()


def _missing(wanted: dict[str, int]) -> list[str]:
    """Which capabilities this process does not have in force."""
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return [name for name, number in wanted.items() if not effective >> number & 1]
