"""The daemon as the control plane sees it: joins the kernel's reads with the node's figures and the model files."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from llmosd import figures
from llmosd.control.eventlog import EventLog
from llmosd.control.machine import About, CheckRow, DeviceRow, Gauge, Refused, Used
from llmosd.declared import DeclarationError, convert
from llmosd.failpoint import failpoint
from llmosd.isolationcheck import CannotIsolate, IsolationCheck
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.kernel import Kernel
from llmosd.kernel.spec import Limits, ModelSpec
from llmosd.kernel.units import encode_quantity
from llmosd.modelfile import ModelDirectory, parse, write_whole
from llmosd.node import doctor
from llmosd.node.confine import Unenforceable
from llmosd.node.devices import take_inventory
from llmosd.node.node import Node
from llmosd.node.watch import Measured
from llmosd.programs import GATEWAY
from llmosd.upgrade import NotUpgraded

log = logging.getLogger("llmosd")


class LocalMachine:
    """One daemon's machine; implements `control.machine.Machine`."""

    def __init__(
        self,
        kernel: Kernel,
        node: Node,
        feed: Callable[[on.Event], None],
        events: EventLog,
        about: About,
        models: ModelDirectory,
        overrides: Path,
        isolation: IsolationCheck,
        upgrade: Callable[[], Awaitable[str]],
    ) -> None:
        """`overrides`: the directory of limits that operators set on models. `upgrade`: see `Daemon.upgrade`."""
        self.kernel = kernel
        self.events = events
        self.about = about
        self.node = node
        #: Further counts, by the parts that keep them.
        self.counts: list[Callable[[], dict[str, int]]] = [kernel.counters]
        self._feed = feed
        self._models = models
        self._overrides = overrides
        self._upgrade = upgrade
        self._isolation = isolation
        self._files: dict[str, Path] = {}
        #: Held while models change: who reads all files must not undo what is applied meanwhile.
        self._changing = asyncio.Lock()
        self._calls: dict[int, asyncio.Future[do.Replied]] = {}
        self._call = 0
        self._started = time.monotonic()

    def now(self) -> float:
        return time.monotonic()

    def uptime(self) -> float:
        return time.monotonic() - self._started

    def stopping(self) -> bool:
        return self.kernel.fleet.shutting_down

    def counters(self) -> dict[str, int]:
        return {name: count for counts in self.counts for name, count in counts().items()}

    # -- commands -------------------------------------------------------------------------------------------

    async def command(self, make: Callable[[int], on.Event]) -> do.Replied:
        self._call += 1
        call = self._call
        future: asyncio.Future[do.Replied] = asyncio.get_running_loop().create_future()
        self._calls[call] = future
        self._feed(make(call))
        replied = await future
        if replied.refusal:
            raise Refused(replied.refusal, replied.message)
        return replied

    def replied(self, effect: do.Replied) -> None:
        """The kernel's answer to a command."""
        if (future := self._calls.pop(effect.call, None)) is not None and not future.done():
            future.set_result(effect)

    async def upgrade(self) -> str:
        try:
            return await self._upgrade()
        except NotUpgraded as error:
            raise Refused("refused", str(error)) from None

    # -- models ---------------------------------------------------------------------------------------------

    async def apply(self, text: str, file_name: str) -> do.Replied:
        async with self._changing:
            return await self._apply(text, file_name)

    async def _apply(self, text: str, file_name: str) -> do.Replied:
        try:
            spec = await asyncio.to_thread(parse, text, file_name)
        except DeclarationError as error:
            raise Refused("invalid", str(error)) from None
        await self._check_spec(spec)
        try:
            path = await asyncio.to_thread(self._models.place, spec.model)
        except DeclarationError as error:
            raise Refused("refused", str(error)) from None
        replied = await self.command(lambda call: on.Apply(call, spec))
        self._files[spec.model] = path
        try:
            self._override_path(spec.model).unlink(missing_ok=True)
            failpoint("apply.kept")
            await asyncio.to_thread(self._models.keep, path, text)
        except OSError as error:
            message = f"model {spec.model} is in force, but its file cannot be kept in {self._models.path}: {error}"
            raise Refused("refused", message) from None
        return msgspec.structs.replace(replied, message=f"model {spec.model} applied")

    async def remove(self, model: str) -> do.Replied:
        async with self._changing:
            return await self._remove(model)

    async def _remove(self, model: str) -> do.Replied:
        name = self.kernel.fleet.names.get(model, model)
        if name == GATEWAY:
            raise Refused("refused", "the gateway is switched off in llmosd.toml: [gateway] enabled = false")
        replied = await self.command(lambda call: on.Remove(call, name))
        self._files.pop(name, None)
        self._override_path(name).unlink(missing_ok=True)
        try:
            await asyncio.to_thread(self._models.remove, name)
        except OSError as error:
            raise Refused("refused", f"model {name} was removed, but its file cannot be: {error}") from None
        return msgspec.structs.replace(replied, message=f"model {name} removed")

    async def reload(self) -> tuple[list[str], list[str], list[str]]:
        async with self._changing:
            return await self._reload()

    async def _reload(self) -> tuple[list[str], list[str], list[str]]:
        models, refused = await asyncio.to_thread(self._models.read_all)
        applied: list[str] = []
        removed: list[str] = []
        why = await self._apply_all(models, applied)
        # A file that is wrong now does not take its model away: the running set stays.
        broken = {line.partition(":")[0] for line in (*refused, *why.values())}
        for name in [view.spec.model for view in self.kernel.models()]:
            if name not in models and name != GATEWAY and str(self._files.get(name, "")) not in broken:
                await self.command(lambda call, name=name: on.Remove(call, name))  # type: ignore[misc]
                self._files.pop(name, None)
                removed.append(name)
        if removed and why:
            why = await self._apply_all({name: models[name] for name in why}, applied)
        return applied, removed, [*refused, *why.values()]

    async def _apply_all(self, models: Mapping[str, tuple[ModelSpec, Path]], applied: list[str]) -> dict[str, str]:
        """Apply in whatever order works: a file may be right only beside the new version of one that is read after it,
        as when two models come to require each other the other way round. Returns why the rest is refused, by name."""
        while True:
            why: dict[str, str] = {}
            for name, (spec, path) in models.items():
                try:
                    await self._check_spec(spec)
                    await self.command(lambda call, spec=spec: on.Apply(call, self.overridden(spec)))  # type: ignore[misc]
                    self._files[name] = path
                    applied.append(name)
                except Refused as error:
                    why[name] = f"{path}: {error}"
            if len(why) in (0, len(models)):
                return why
            models = {name: models[name] for name in why}

    def file_of(self, model: str) -> Path | None:
        return self._files.get(model)

    # -- limits ---------------------------------------------------------------------------------------------

    def check_limits(self, limits: Limits) -> None:
        try:
            self.node.confinement.check(limits)
        except Unenforceable as error:
            raise Refused("refused", f"limits: {error}") from None

    async def _check_spec(self, spec: ModelSpec) -> None:
        """Raises Refused for what this machine cannot do."""
        self.check_limits(spec.limits)
        if spec.resources.cpu_placement == "exclusive" and not self.enforcement("allowed_cpus"):
            raise Refused("refused", "resources.cpu_placement: nothing on this machine can keep a worker on its CPUs")
        try:
            await self._isolation.check(spec)
        except CannotIsolate as error:
            raise Refused("refused", str(error)) from None

    def enforcement(self, limit: str, worker: str = "") -> str:
        return self.node.confinement_of(worker).enforcement(limit)

    def keep_limits(self, model: str, changes: Mapping[str, object]) -> None:
        """Only what an operator changed: for the rest the model's file counts, and what is edited there."""
        kept = self._kept_limits(model) | msgspec.to_builtins(changes, enc_hook=encode_quantity)
        try:
            self._overrides.mkdir(exist_ok=True)
            write_whole(self._override_path(model), msgspec.json.encode(kept))
        except OSError as error:
            message = f"the limits of {model} are in force, but cannot be kept in {self._overrides}: {error}"
            raise Refused("refused", message) from None

    def overridden(self, spec: ModelSpec) -> ModelSpec:
        """The spec with the limits that operators set after its file was written."""
        kept = self._kept_limits(spec.model)
        if not kept:
            return spec
        defaults = msgspec.structs.asdict(Limits())
        try:
            asked = convert({name: value for name, value in kept.items() if value is not None}, Limits, "limits")
            values = {name: defaults[name] if value is None else getattr(asked, name) for name, value in kept.items()}
            limits = msgspec.structs.replace(spec.limits, **values)
            self.check_limits(limits)
        except (DeclarationError, KeyError, Refused) as error:
            log.warning("model %s: the limits that were set on it are left out: %s", spec.model, error)
            return spec
        return msgspec.structs.replace(spec, limits=limits)

    def _kept_limits(self, model: str) -> dict[str, Any]:
        try:
            return msgspec.json.decode(self._override_path(model).read_bytes(), type=dict[str, Any])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            log.warning("model %s: the limits that were set on it cannot be read: %s", model, error)
            return {}

    def _override_path(self, model: str) -> Path:
        return self._overrides / f"{model}.json"

    # -- figures --------------------------------------------------------------------------------------------

    def used(self, worker: str) -> Used:
        measured = self.node.watch.measured.get(worker, Measured())
        usage = measured.usage
        return Used(measured.cpu_percent, usage.memory_bytes, usage.resident_bytes, usage.processes, usage.threads)

    async def gauges(self, worker: str) -> dict[str, Gauge]:
        counted = await self.node.counters(worker)
        measured = self.node.watch.measured.get(worker, Measured())
        view = next((view for view in self.kernel.workers() if view.name == worker), None)
        return figures.gauges(counted, measured, self.node.confinement_of(worker).enforcement, view)

    def log_file(self, worker: str) -> Path:
        return self.node.logs.log_file(worker)

    def logged_workers(self, name: str) -> list[str]:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*(@\d+)?", name):
            return []  # no worker's name, but perhaps another file's
        if "@" in name:
            return [name] if self.log_file(name).exists() else []
        names = (path.stem for path in self.node.logs.directory.glob(f"{name}@*.log"))
        return sorted((worker for worker in names if worker.rpartition("@")[2].isdecimal()), key=_number)

    async def devices(self) -> tuple[list[DeviceRow], list[str]]:
        inventory = await asyncio.to_thread(take_inventory)
        workers = [view for view in self.kernel.workers() if view.pid]
        used = [self.used(view.name) for view in workers]
        return figures.device_rows(inventory, self.kernel.ledger(), workers, used), list(inventory.notes)

    async def diagnose(self) -> list[CheckRow]:
        lacking = await self._isolation.lacking()

        def look() -> list[Any]:
            inventory = take_inventory()
            facts = doctor.look(inventory, self.node.confinement, self.about.runtime_directory, isolation=lacking)
            return doctor.diagnose(facts)

        checks = await asyncio.to_thread(look)
        return [CheckRow(check.name, check.result, check.message, check.advice) for check in checks]


def _number(worker: str) -> int:
    return int(worker.rpartition("@")[2])
