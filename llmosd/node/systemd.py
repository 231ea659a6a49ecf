"""systemd's manager, asked over D-Bus: transient scopes, their properties, and the unit that we are in.

org.freedesktop.systemd1(5) describes the interface. The system's manager for root, the user's own for anyone else.
Calls are made on the loop; `in_loop` is for threads. A connection that broke is made again with the next call.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from dbus_fast import BusType, DBusError, Message, MessageType, Variant
from dbus_fast.aio import MessageBus

T = TypeVar("T")

_SERVICE: Final = "org.freedesktop.systemd1"
_PATH: Final = "/org/freedesktop/systemd1"
_MANAGER: Final = f"{_SERVICE}.Manager"
_PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_BUS: Final = "org.freedesktop.DBus"
_MATCH: Final = f"type='signal',sender='{_SERVICE}',interface='{_MANAGER}',member='JobRemoved',path='{_PATH}'"
#: Seconds that systemd has to answer. It reloads itself in less, also where there are thousands of units.
ANSWER_S: Final = 25.0

#: Properties of a unit by name.
Properties = dict[str, Variant]


class SystemdError(OSError):
    """systemd did not do what it was asked. The text says what that was, and why."""


class Manager:
    """A connection to systemd."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._bus: MessageBus | None = None
        self._connecting = asyncio.Lock()
        #: Jobs that are awaited, by their unit; each gets the job's result.
        self._jobs: dict[str, asyncio.Future[str]] = {}
        #: systemd's version, for example 252.
        self.version = 0

    async def connect(self) -> None:
        """Raises SystemdError."""
        async with self._connecting:
            if self._bus is not None and self._bus.connected:
                return
            kind = BusType.SYSTEM if os.geteuid() == 0 else BusType.SESSION
            try:
                bus = await asyncio.wait_for(MessageBus(bus_type=kind).connect(), ANSWER_S)
            except Exception as error:  # noqa: BLE001  # the library raises what it comes upon; each means the same here
                raise SystemdError(f"no D-Bus: {error or type(error).__name__}") from None
            bus.add_message_handler(self._on_message)
            try:
                await _send(bus, _BUS, "/org/freedesktop/DBus", _BUS, "AddMatch", "s", [_MATCH])
                await _send(bus, _SERVICE, _PATH, _MANAGER, "Subscribe")
                found = await _send(bus, _SERVICE, _PATH, _PROPERTIES, "Get", "ss", [_MANAGER, "Version"])
            except SystemdError:
                bus.disconnect()  # without the signals that were asked for, no job would ever be seen to end
                raise
            self._bus, version = bus, found[0].value
            self.version = int("".join(c for c in str(version).split(".")[0].split("~")[0] if c.isdigit()) or 0)

    def close(self) -> None:
        if self._bus is not None:
            self._bus.disconnect()

    def in_loop(self, call: Coroutine[Any, Any, T]) -> T:
        """Make a call from another thread, and wait for it. Raises SystemdError."""
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(2 * ANSWER_S)

    # -- scopes ---------------------------------------------------------------------------------------------

    async def start_scope(self, unit: str, pid: int, properties: Properties) -> None:
        """Put a process into a new scope; returns once it is there. Raises SystemdError."""
        asked = [["PIDs", Variant("au", [pid])], *([name, value] for name, value in properties.items())]
        removed = self._jobs[unit] = self._loop.create_future()
        try:
            # The call is answered before the process is moved: the end of the job tells.
            await self._call("StartTransientUnit", "ssa(sv)a(sa(sv))", [unit, "fail", asked, []])
            async with asyncio.timeout(ANSWER_S):
                result = await removed
        except TimeoutError:
            raise SystemdError(f"systemd did not start {unit} within {ANSWER_S:g} s") from None
        finally:
            del self._jobs[unit]
        if result != "done":
            raise SystemdError(f"systemd did not start {unit}: its job is {result}; `journalctl -u {unit}` may say why")

    async def set_properties(self, unit: str, properties: Properties) -> None:
        """Change a unit until it ends. Raises SystemdError."""
        asked = [[name, value] for name, value in properties.items()]
        await self._call("SetUnitProperties", "sba(sv)", [unit, True, asked])

    # -- our own unit ---------------------------------------------------------------------------------------

    async def unit_of(self, pid: int) -> str:
        """The name of the unit that a process is in. Raises SystemdError."""
        path = (await self._call("GetUnitByPID", "u", [pid]))[0]
        return str(await self._property(path, f"{_SERVICE}.Unit", "Id"))

    # -- messages -------------------------------------------------------------------------------------------

    async def _call(self, member: str, signature: str, body: list[Any]) -> list[Any]:
        await self.connect()
        assert self._bus is not None, "connected just now"
        return await _send(self._bus, _SERVICE, _PATH, _MANAGER, member, signature, body)

    async def _property(self, path: str, interface: str, name: str) -> Any:
        assert self._bus is not None, "asked something before"
        (found,) = await _send(self._bus, _SERVICE, path, _PROPERTIES, "Get", "ss", [interface, name])
        return found.value

    def _on_message(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL and message.member == "JobRemoved":
            _, _, unit, result = message.body
            waiting = self._jobs.get(unit)
            if waiting is not None and not waiting.done():
                waiting.set_result(result)


async def _send(
    bus: MessageBus,
    service: str,
    path: str,
    interface: str,
    member: str,
    signature: str = "",
    body: list[Any] | None = None,
) -> list[Any]:  # fmt: skip
    message = Message(
        destination=service, path=path, interface=interface, member=member, signature=signature, body=body or []
    )
    try:
        reply = await asyncio.wait_for(bus.call(message), ANSWER_S)
    except TimeoutError:
        raise SystemdError(f"systemd did not answer {member} within {ANSWER_S:g} s") from None
    except (DBusError, EOFError, OSError) as error:
        raise SystemdError(f"{member}: {error}") from None
    if reply is None:
        raise SystemdError(f"{member}: the connection to D-Bus was closed")
    if reply.message_type is MessageType.ERROR:
        why = reply.body[0] if reply.body else reply.error_name
        raise SystemdError(f"{member}: {why}")
    return list(reply.body)
