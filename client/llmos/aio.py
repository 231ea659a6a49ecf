"""The asynchronous client: `llmos.AsyncClient`.

    async with llmos.AsyncClient() as client:
        print(await client.ps())
        answer = await client.run("gemma3-270m", "The capital of France is", max_tokens=16)
        async for piece in client.run("gemma3-270m", "Once upon a time", stream=True):
            print(piece.text, end="")

Requests to models travel over the bus, all else over the control plane. The two connections are opened when they are
first needed. A restart of the daemon is a pause here: calls wait for it, streams go on where they were. Failures are
`llmos.errors`. The synchronous twin, `llmos.Client`, runs this code.
"""

from __future__ import annotations

import asyncio
import signal as signals
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, overload

from llmos import address as addresses
from llmos import completions, types
from llmos.answers import Pieces, completion, whole
from llmos.bus import AsyncBus, Stream
from llmos.errors import DaemonUnreachable, DeadlineExceeded, Invalid
from llmos.following import DEAD_ENDS, arrived, where
from llmos.signals import signal_number

if TYPE_CHECKING:
    from llmos.control import Control


#: Seconds in which a new program must serve.
UPGRADE_S: Final = 60.0


class AsyncClient:
    """One daemon. Use it as a context manager, or `close` it; inside one event loop."""

    def __init__(self, host: str | PathLike[str] | None = None, *, tenant: str = "", patience: float = 5.0) -> None:
        """`host`: a runtime directory; None: LLMOS_HOST, or search. `tenant`: whom requests are accounted to; empty:
        the user. `patience`: seconds to wait for a daemon that does not answer.

        Raises DaemonUnreachable when there is no socket to connect to.
        """
        self.address: Final = addresses.find(host)
        self.tenant: Final = tenant
        self._patience = patience
        self._control: Control | None = None
        self._bus: AsyncBus | None = None
        self._opening = asyncio.Lock()

    async def close(self) -> None:
        """End both connections. Streams that are open are cancelled."""
        bus, control, self._bus, self._control = self._bus, self._control, None, None
        if bus is not None:
            await bus.close()
        if control is not None:
            await control.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- looking --------------------------------------------------------------------------------------------

    async def status(self) -> types.Status:
        """What the daemon is and how it does."""
        return types.Status.of(await self._call("GetStatus", "GetStatusRequest"))

    async def models(self) -> tuple[types.Model, ...]:
        answer = await self._call("ListModels", "ListModelsRequest")
        return tuple(map(types.Model.of, answer.models))

    async def model(self, name: str) -> types.Model:
        return types.Model.of(await self._call("GetModel", "GetModelRequest", name=name))

    async def ps(self, name: str = "", *, include_stopped: bool = False) -> tuple[types.Worker, ...]:
        """The workers, or those of one model, alias or worker; with `include_stopped` those without a process too."""
        answer = await self._call("ListWorkers", "ListWorkersRequest", name=name, all=include_stopped)
        return tuple(map(types.Worker.of, answer.workers))

    async def worker(self, name: str) -> types.Worker:
        return types.Worker.of(await self._call("GetWorker", "GetWorkerRequest", name=name))

    async def watch(self, name: str = "", *, include_stopped: bool = False) -> AsyncGenerator[tuple[types.Worker, ...]]:
        """The list of `ps`, now and after each change, on and on."""
        request = _messages().ListWorkersRequest(name=name, all=include_stopped)
        async with aclosing(self._connected().stream("WatchWorkers", lambda: request, again=True)) as answers:
            async for answer in answers:
                yield tuple(map(types.Worker.of, answer.workers))

    async def requests(self, name: str = "") -> tuple[types.Request, ...]:
        """Calls in flight: all, or those of one model, alias or worker."""
        answer = await self._call("ListRequests", "ListRequestsRequest", name=name)
        return tuple(map(types.Request.of, answer.requests))

    async def devices(self) -> types.Devices:
        return types.Devices.of(await self._call("ListDevices", "ListDevicesRequest"))

    async def doctor(self) -> tuple[types.Check, ...]:
        """What this machine can and cannot enforce, and how to get the rest."""
        answer = await self._call("Diagnose", "DiagnoseRequest")
        return tuple(map(types.Check.of, answer.checks))

    async def logs(self, worker: str, *, lines: int = 100, follow: bool = False) -> AsyncGenerator[str]:
        """A worker's log: the last `lines`, -1: all that are kept; with `follow` on and on, across restarts."""
        position: int | None = None

        def request() -> Any:
            return _messages().ReadLogsRequest(worker=worker, lines=lines, follow=follow, after=position)

        async with aclosing(self._connected().stream("ReadLogs", request, again=follow)) as answers:
            async for answer in answers:
                position = answer.position
                for line in answer.lines:
                    yield line

    async def events(self, *, after: int = 0, follow: bool = False) -> AsyncGenerator[types.Event]:
        """What happened after the cursor `after`, 0: all that is kept; with `follow` on and on, none twice."""
        cursor = after

        def request() -> Any:
            return _messages().WatchEventsRequest(after=cursor, follow=follow)

        async with aclosing(self._connected().stream("WatchEvents", request, again=follow)) as answers:
            async for answer in answers:
                cursor = answer.cursor
                yield types.Event.of(answer)

    # -- models ---------------------------------------------------------------------------------------------

    async def apply(self, model: str | Path, *, file_name: str = "") -> types.Command:
        """Add a model or change one: from a model file's path, or from its text."""
        if isinstance(model, Path):
            try:
                text, file_name = await asyncio.to_thread(model.read_text, "utf-8"), file_name or str(model)
            except (OSError, UnicodeDecodeError) as error:
                raise Invalid(f"cannot read the model file {model}: {error}.") from error
        else:
            text = model
        return types.Command.of(await self._call("ApplyModel", "ApplyModelRequest", toml=text, file_name=file_name))

    async def remove(self, name: str) -> types.Command:
        """Stop a model's workers, forget it and delete its file."""
        return types.Command.of(await self._call("DeleteModel", "DeleteModelRequest", repeatable=False, name=name))

    async def reload(self) -> types.Reloaded:
        """Have the daemon read models.d again."""
        return types.Reloaded.of(await self._call("Reload", "ReloadRequest"))

    async def upgrade(self, *, timeout: float = UPGRADE_S) -> types.Status:
        """Replace the daemon's program by the one that is installed now, and wait until that one serves.

        Workers, streams and connections to the bus go on. Raises Refused when the new program does not work; the old
        one then goes on.
        """
        asked_at = time.monotonic()
        await self._call("Upgrade", "UpgradeRequest", repeatable=False)
        while time.monotonic() < asked_at + timeout:
            try:
                status = await self.status()
            except DaemonUnreachable:
                continue  # between the programs
            if status.uptime < time.monotonic() - asked_at:
                return status
            await asyncio.sleep(0.05)
        raise DaemonUnreachable(f"after {timeout:g} s no new program serves. The daemon's log says why.")

    # -- workers --------------------------------------------------------------------------------------------
    # `name` is a model's, an alias's or a worker's. These come back when the command is taken on; `wait` for the rest.

    async def start(self, name: str) -> types.Command:
        return types.Command.of(await self._call("StartWorkers", "NameRequest", name=name))

    async def stop(self, name: str, *, now: bool = False) -> types.Command:
        """`now`: do not wait for the requests that run."""
        return types.Command.of(await self._call("StopWorkers", "StopRequest", name=name, now=now))

    async def restart(self, name: str) -> types.Command:
        return types.Command.of(await self._call("RestartWorkers", "NameRequest", repeatable=False, name=name))

    async def reset(self, name: str) -> types.Command:
        """Clear `failed`."""
        return types.Command.of(await self._call("ResetWorkers", "NameRequest", name=name))

    async def kill(self, name: str, signal: int | str = signals.SIGTERM) -> types.Command:
        """Send a signal, by its number or name. A request, named by its id or its beginning, is cancelled."""
        number = signal_number(signal)
        return types.Command.of(
            await self._call("KillWorkers", "KillRequest", repeatable=False, name=name, signal=number)
        )

    async def limits(self, name: str) -> tuple[types.WorkerLimits, ...]:
        answer = await self._call("GetLimits", "NameRequest", name=name)
        return tuple(map(types.WorkerLimits.of, answer.limits))

    async def set_limits(self, name: str, limits: Mapping[str, str]) -> tuple[types.WorkerLimits, ...]:
        """Change limits, live: ``{"memory_max": "2G"}``. An empty value gives a limit its default again."""
        answer = await self._call("SetLimits", "SetLimitsRequest", name=name, limits=dict(limits))
        return tuple(map(types.WorkerLimits.of, answer.limits))

    async def wait(
        self,
        names: str | Collection[str],
        states: Collection[str] = ("ready",),
        *,
        dead_ends: Collection[str] = DEAD_ENDS,
        timeout: float | None = None,
        on_change: Callable[[Sequence[types.Worker]], None] | None = None,
    ) -> tuple[types.Worker, ...]:
        """Until each worker of `names` (workers', or models') is in one of `states`; returns them.

        Raises WorkerFailed when one is in one of `dead_ends`, DeadlineExceeded after `timeout` seconds. `on_change` is
        called with what is seen on the way.
        """
        wanted = {names} if isinstance(names, str) else set(names)
        seen: list[types.Worker] = []
        try:
            async with asyncio.timeout(timeout), aclosing(self.watch(include_stopped=True)) as lists:
                async for workers in lists:
                    seen = [worker for worker in workers if wanted & {worker.name, worker.model}]
                    if on_change is not None:
                        on_change(seen)
                    if arrived(wanted, seen, states, dead_ends):
                        break
        except TimeoutError:
            message = f"waited {timeout:g} s for {' or '.join(states)}, but {where(seen)}. It goes on: see `llmos ps`."
            raise DeadlineExceeded(message) from None
        return tuple(seen)

    # -- requests to models ---------------------------------------------------------------------------------

    @overload
    def run(
        self, model: str, prompt: str | None = None, *, stream: Literal[False] = False, chat: bool = False,
        messages: Sequence[Mapping[str, Any]] | None = None, timeout: float | None = None, priority: int = 0,
        **params: Any,
    ) -> Coroutine[Any, Any, types.Completion]: ...  # fmt: skip
    @overload
    def run(
        self, model: str, prompt: str | None = None, *, stream: Literal[True], chat: bool = False,
        messages: Sequence[Mapping[str, Any]] | None = None, timeout: float | None = None, priority: int = 0,
        **params: Any,
    ) -> Pieces: ...  # fmt: skip
    def run(
        self,
        model: str,
        prompt: str | None = None,
        *,
        stream: bool = False,
        chat: bool = False,
        messages: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
        priority: int = 0,
        **params: Any,
    ) -> Coroutine[Any, Any, types.Completion] | Pieces:
        """Have a model complete a prompt, or answer it with `chat`, or go on with `messages`.

        Await it for the whole answer; with `stream`, iterate over its pieces. `timeout` is in seconds, None is the
        model's own. `params` are the engine's: ``max_tokens=64, temperature=0, seed=1``.
        """
        path, body = completions.request(model, prompt, messages, chat, stream, params)
        submit = partial(self.submit, model, path, body, stream=stream, timeout=timeout, priority=priority)
        return Pieces(submit) if stream else completion(submit)

    async def embed(self, model: str, text: str | Sequence[str], *, timeout: float | None = None) -> list[list[float]]:
        """Embeddings: one vector for each text."""
        body = completions.encode({"model": model, "input": text})
        _, payload = await whole(partial(self.submit, model, completions.EMBEDDINGS, body, timeout=timeout))
        return completions.read_embeddings(payload)

    async def tokenize(self, model: str, text: str, *, timeout: float | None = None) -> list[int]:
        """The ids of a text's tokens, where the engine can tell."""
        # llama.cpp wants `content`, vLLM `prompt`; each passes over the other's.
        body = completions.encode({"model": model, "content": text, "prompt": text})
        _, payload = await whole(partial(self.submit, model, completions.TOKENIZE, body, timeout=timeout))
        return completions.read_tokens(payload)

    async def submit(
        self, model: str, path: str, body: bytes, *, stream: bool = False, timeout: float | None = None,
        priority: int = 0,
    ) -> Stream:  # fmt: skip
        """Any request to a model, as raw bytes; the stream that comes back ends with a raw final."""
        async with self._opening:
            if self._bus is None:
                bus = AsyncBus(self.address.bus)
                await bus.open(self._patience)
                self._bus = bus
        return self._bus.submit(
            model, path, body, stream=stream, tenant=self.tenant, priority=priority, timeout=timeout
        )

    # -- inside ---------------------------------------------------------------------------------------------

    def _connected(self) -> Control:
        if self._control is None:
            from llmos.control import Control

            self._control = Control(self.address, self._patience)
        return self._control

    async def _call(self, method: str, request: str, *, repeatable: bool = True, **fields: Any) -> Any:
        control = self._connected()
        return await control.call(method, getattr(_messages(), request)(**fields), repeatable=repeatable)


def _messages() -> Any:
    """The generated messages, loaded when first needed: protobuf costs 30 ms."""
    from llmos.v1 import control_pb2

    return control_pb2
