"""What the control plane needs of the daemon. The composition root provides it; tests may provide a small one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from llmosd.control.eventlog import EventLog
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.kernel import Kernel
from llmosd.kernel.spec import Limits


class Used(msgspec.Struct, frozen=True):
    """What a worker used when it was last looked at."""

    cpu_percent: float = 0.0
    memory_bytes: int = 0
    resident_bytes: int = 0
    processes: int = 0
    threads: int = 0


class Gauge(msgspec.Struct, frozen=True):
    """What of a limit is used, in the limit's own unit, and the most that was used in this life of the worker."""

    used: float
    peak: float | None = None


class DeviceRow(msgspec.Struct, frozen=True):
    """A device, as `llmos devices` shows it."""

    kind: str
    id: str
    name: str
    total: float
    reserved: float
    used: float
    workers: tuple[str, ...] = ()
    properties: dict[str, str] = {}


class CheckRow(msgspec.Struct, frozen=True):
    """A line of `llmos doctor`."""

    name: str
    result: str
    message: str
    advice: str


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a daemon is."""

    version: str
    user: str
    confinement: str
    models_directory: Path
    runtime_directory: Path
    log_directory: Path
    bus_address: str
    gateway_url: str


class Refused(Exception):  # noqa: N818  # an answer, not a fault
    """A command is not carried out. `code`: not_found, refused or invalid."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Machine(Protocol):
    """See the module."""

    kernel: Kernel
    events: EventLog
    about: About

    def now(self) -> float:
        """The kernel's clock."""

    def stopping(self) -> bool: ...

    def uptime(self) -> float: ...

    def counters(self) -> dict[str, int]: ...

    async def command(self, make: Callable[[int], on.Event]) -> do.Replied:
        """Give the kernel a command, made from a call number. Raises Refused."""

    async def upgrade(self) -> str:
        """Begin to replace the daemon's program by the one that is installed now; its version. Raises Refused."""

    async def apply(self, text: str, file_name: str) -> do.Replied:
        """Put a model file in force and keep it. Raises Refused."""

    async def remove(self, model: str) -> do.Replied:
        """Raises Refused."""

    async def reload(self) -> tuple[list[str], list[str], list[str]]:
        """Read the model files again: (applied, removed, refused)."""

    def keep_limits(self, model: str, changes: Mapping[str, object]) -> None:
        """Remember what was changed of a model's limits over a restart of the daemon. Raises Refused."""

    def used(self, worker: str) -> Used: ...

    async def gauges(self, worker: str) -> dict[str, Gauge]:
        """What of a worker's limits is used, by limit, measured as whoever enforces it does."""

    def enforcement(self, limit: str, worker: str = "") -> str:
        """Who sees to a limit of a worker, or of one to come."""

    def check_limits(self, limits: Limits) -> None:
        """Raises Refused for a limit that this machine can neither enforce nor watch."""

    def file_of(self, model: str) -> Path | None: ...

    def log_file(self, worker: str) -> Path: ...

    def logged_workers(self, name: str) -> list[str]:
        """Workers with a log: those of a model, or the one of that name. They need not be there any more."""

    async def devices(self) -> tuple[list[DeviceRow], list[str]]:
        """(devices, notes)"""

    async def diagnose(self) -> list[CheckRow]: ...
