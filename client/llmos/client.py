"""The synchronous client: `llmos.Client`, the twin of `llmos.AsyncClient`.

    with llmos.Client() as client:
        for piece in client.run("gemma3-270m", "Once upon a time", stream=True):
            print(piece.text, end="")

There is one implementation: each method here runs AsyncClient's of the same name on an event loop of its own, in a
private thread. May be used from several threads at once, not from inside an event loop that must go on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from llmos import types
from llmos.aio import AsyncClient
from llmos.answers import Pieces as AsyncPieces
from llmos.errors import LlmosError
from llmos.following import DEAD_ENDS

T = TypeVar("T")


class Client:
    """One daemon. Use it as a context manager, or `close` it. Methods are AsyncClient's, and documented there."""

    def __init__(self, host: str | PathLike[str] | None = None, *, tenant: str = "", patience: float = 5.0) -> None:
        """As AsyncClient's. Raises DaemonUnreachable when there is no socket to connect to."""
        self._loop = asyncio.new_event_loop()
        try:
            # Its lock belongs to no loop before it is used, so it may be made here.
            self._aio = AsyncClient(host, tenant=tenant, patience=patience)
        except BaseException:
            self._loop.close()
            raise
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmos", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the connections and the thread. Streams that are open are cancelled."""
        if self._loop.is_closed():
            return
        self._run(self._aio.close())
        self._run(self._loop.shutdown_asyncgens())
        self._run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- looking --------------------------------------------------------------------------------------------

    def status(self) -> types.Status:
        return self._run(self._aio.status())

    def models(self) -> tuple[types.Model, ...]:
        return self._run(self._aio.models())

    def model(self, name: str) -> types.Model:
        return self._run(self._aio.model(name))

    def ps(self, name: str = "", *, include_stopped: bool = False) -> tuple[types.Worker, ...]:
        return self._run(self._aio.ps(name, include_stopped=include_stopped))

    def worker(self, name: str) -> types.Worker:
        return self._run(self._aio.worker(name))

    def watch(self, name: str = "", *, include_stopped: bool = False) -> Iterator[tuple[types.Worker, ...]]:
        return self._iterate(self._aio.watch(name, include_stopped=include_stopped))

    def requests(self, name: str = "") -> tuple[types.Request, ...]:
        return self._run(self._aio.requests(name))

    def devices(self) -> types.Devices:
        return self._run(self._aio.devices())

    def doctor(self) -> tuple[types.Check, ...]:
        return self._run(self._aio.doctor())

    def logs(self, worker: str, *, lines: int = 100, follow: bool = False) -> Iterator[str]:
        return self._iterate(self._aio.logs(worker, lines=lines, follow=follow))

    def events(self, *, after: int = 0, follow: bool = False) -> Iterator[types.Event]:
        return self._iterate(self._aio.events(after=after, follow=follow))

    # -- models and workers ---------------------------------------------------------------------------------

    def apply(self, model: str | Path, *, file_name: str = "") -> types.Command:
        return self._run(self._aio.apply(model, file_name=file_name))

    def remove(self, name: str) -> types.Command:
        return self._run(self._aio.remove(name))

    def reload(self) -> types.Reloaded:
        return self._run(self._aio.reload())

    def upgrade(self) -> types.Status:
        return self._run(self._aio.upgrade())

    def start(self, name: str) -> types.Command:
        return self._run(self._aio.start(name))

    def stop(self, name: str, *, now: bool = False) -> types.Command:
        return self._run(self._aio.stop(name, now=now))

    def restart(self, name: str) -> types.Command:
        return self._run(self._aio.restart(name))

    def reset(self, name: str) -> types.Command:
        return self._run(self._aio.reset(name))

    def kill(self, name: str, signal: int | str = "TERM") -> types.Command:
        return self._run(self._aio.kill(name, signal))

    def limits(self, name: str) -> tuple[types.WorkerLimits, ...]:
        return self._run(self._aio.limits(name))

    def set_limits(self, name: str, limits: Mapping[str, str]) -> tuple[types.WorkerLimits, ...]:
        return self._run(self._aio.set_limits(name, limits))

    def wait(
        self,
        names: str | Collection[str],
        states: Collection[str] = ("ready",),
        *,
        dead_ends: Collection[str] = DEAD_ENDS,
        timeout: float | None = None,
        on_change: Callable[[Sequence[types.Worker]], None] | None = None,
    ) -> tuple[types.Worker, ...]:
        return self._run(self._aio.wait(names, states, dead_ends=dead_ends, timeout=timeout, on_change=on_change))

    # -- requests to models ---------------------------------------------------------------------------------

    @overload
    def run(
        self, model: str, prompt: str | None = None, *, stream: Literal[False] = False, chat: bool = False,
        messages: Sequence[Mapping[str, Any]] | None = None, timeout: float | None = None, priority: int = 0,
        **params: Any,
    ) -> types.Completion: ...  # fmt: skip
    @overload
    def run(
        self, model: str, prompt: str | None = None, *, stream: Literal[True], chat: bool = False,
        messages: Sequence[Mapping[str, Any]] | None = None, timeout: float | None = None, priority: int = 0,
        **params: Any,
    ) -> Pieces: ...  # fmt: skip
    def run(self, model: str, prompt: str | None = None, *, stream: bool = False, **rest: Any) -> Any:
        if stream:
            return Pieces(self, self._aio.run(model, prompt, stream=True, **rest))
        return self._run(self._aio.run(model, prompt, **rest))

    def embed(self, model: str, text: str | Sequence[str], *, timeout: float | None = None) -> list[list[float]]:
        return self._run(self._aio.embed(model, text, timeout=timeout))

    def tokenize(self, model: str, text: str, *, timeout: float | None = None) -> list[int]:
        return self._run(self._aio.tokenize(model, text, timeout=timeout))

    # -- inside ---------------------------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the private loop. Ctrl-C cancels it there too."""
        if self._loop.is_closed():
            work.close()
            raise LlmosError("this client is closed. Make another.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _iterate(self, items: AsyncIterator[T]) -> Generator[T]:
        try:
            while True:
                try:
                    item = self._run(_awaited(items.__anext__()))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            aclose = getattr(items, "aclose", None)
            if aclose is not None and not self._loop.is_closed():
                if threading.current_thread() is self._thread:
                    # Collected as garbage over there, where nothing may wait.
                    self._loop.call_soon(self._loop.create_task, _awaited(aclose()))
                else:
                    self._run(_awaited(aclose()))


class Pieces:
    """A streamed answer: an iterator over its pieces. Closing or dropping it cancels the request."""

    def __init__(self, client: Client, pieces: AsyncPieces) -> None:
        self._pieces = pieces
        self._iterator = client._iterate(pieces)

    def __iter__(self) -> Iterator[types.Piece]:
        return self

    def __next__(self) -> types.Piece:
        return next(self._iterator)

    @property
    def completion(self) -> types.Completion | None:
        """The whole text and the counts, once the last piece has been taken."""
        return self._pieces.completion

    def close(self) -> None:
        """No more of it is wanted."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _awaited(work: Awaitable[T]) -> T:
    """As a coroutine: run_coroutine_threadsafe takes nothing else."""
    return await work
