"""Asking, by HTTP, whether something answers; and when it counts as hung.

For the node, which asks commands, for the worker hosts, which ask their engines, and for model files, which name what
is to be asked. Nobody outside this machine is ever asked, no redirect is followed, and of an answer only its first
line counts. What was stopped for a while (a frozen worker, a machine that slept) is never taken for hung by that.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import math
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

import msgspec

from llmosd.kernel.spec import Liveness
from llmosd.kernel.units import Seconds

#: An answer's status stands in its first bytes. The rest is taken in only so that whoever sends it meets no reset.
_ANSWER_MAX: Final = 4096
_REST_S: Final = 0.1
#: Errors that are no answer of anybody's.
_OURS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})")
#: An asker's patience is counted in spans of this: to be stopped for an hour costs one of them.
_SPAN_S: Final = 0.25
#: So much later than wanted, and the asker itself had been stopped.
_STOPPED_S: Final = 1.0


class Target(msgspec.Struct, frozen=True):
    """What is asked: a path of a server on this machine."""

    url: str
    #: In the order in which they are tried.
    addresses: tuple[str, ...]
    port: int
    request: bytes


def target(url: str) -> Target:
    """Reads ``http://127.0.0.1:8080/health``. Raises ValueError with what is wrong with it."""
    expected = "expected a URL such as http://127.0.0.1:8080/health"
    parts = urlsplit(url if re.fullmatch("[!-~]+", url) else "")
    if parts.scheme != "http" or not parts.hostname or "@" in parts.netloc:
        raise ValueError(f"{expected}, got {url[:80]!r}")
    try:
        port = parts.port if parts.port is not None else 80
    except ValueError as error:
        raise ValueError(f"{expected}: {error}") from None
    if port == 0:
        raise ValueError(f"{expected}: nobody is found on port 0")
    host = parts.hostname
    if not is_of_this_machine(host):
        raise ValueError(f"{host} is not this machine; {expected}")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    request = f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUser-Agent: llmosd\r\nConnection: close\r\n\r\n"
    return Target(url, ("127.0.0.1", "::1") if host == "localhost" else (host,), port, request.encode())


def is_of_this_machine(host: str) -> bool:
    """Whether nobody else can be meant."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name: whoever answers for it may change it


class CannotAsk(OSError):  # noqa: N818  # an answer, not a fault
    """It is us who lack something, such as descriptors: that says nothing of the one who would be asked."""


async def get(asked: Target) -> str:
    """Why a GET is not answered with 2xx, or "". Waits for as long as it takes: whoever awaits it has the deadline.

    Raises CannotAsk.
    """
    refusal = ""
    for address in asked.addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as connection:
                connection.setblocking(False)
                await asyncio.get_running_loop().sock_connect(connection, (address, asked.port))
                return await _status(connection, asked)
        except OSError as error:
            if error.errno in _OURS:
                raise CannotAsk(error.errno, os.strerror(error.errno)) from None
            # Not `strerror`: uvloop has its own words there, with the address once more.
            cause = os.strerror(error.errno) if error.errno else str(error)
            refusal = refusal or f"no answer on {asked.url}: {cause}"
    return refusal


async def _status(connection: socket.socket, asked: Target) -> str:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, asked.request)
    head = b""
    while b"\n" not in head and len(head) < _ANSWER_MAX:
        data = await loop.sock_recv(connection, _ANSWER_MAX - len(head))
        if not data:
            break
        head += data
    found = _STATUS.match(head)
    if found is None:
        return f"what answers on {asked.url} is not HTTP"
    try:
        async with asyncio.timeout(_REST_S):
            while len(head) < _ANSWER_MAX and (data := await loop.sock_recv(connection, _ANSWER_MAX - len(head))):
                head += data
    except (TimeoutError, OSError):
        pass  # it keeps the connection, or broke it off: its status was said
    return "" if found[1].startswith(b"2") else f"{asked.url} answers {found[1].decode()}"


async def until_hung(
    liveness: Liveness,
    what: str,
    ask: Callable[[], Awaitable[str]],
    heard_at: Callable[[], float] = lambda: 0.0,
    sooner: asyncio.Event | None = None,
    later_s: float = 0.0,
) -> str:
    """Ask again and again until it counts as hung; returns why.

    `ask` returns why there was no answer, or ""; `what` names its object. `heard_at` says when something else was
    heard from the one who is asked, in monotonic seconds: for an interval after that, it is left alone. `sooner`: ask
    at once when it is set. `later_s`: so much is the first question put off.
    """
    sooner = sooner or asyncio.Event()
    interval_s = liveness.interval or math.inf
    failures, since = 0, time.monotonic() + later_s
    while True:
        if (heard := heard_at()) > since:
            failures, since = 0, heard
        pause_s = since + interval_s - time.monotonic()
        if pause_s > 0 and not sooner.is_set():
            await _first(sooner, pause_s)
            if time.monotonic() > since + interval_s + _STOPPED_S:
                failures = 0
            continue
        sooner.clear()
        since = time.monotonic()
        why, stopped = await _patiently(ask, what, liveness.timeout)
        if not why or stopped or heard_at() >= since:
            failures = 0
        if why and heard_at() < since:
            failures += 1
        if failures >= liveness.failures:
            return f"{why}, {failures} times in a row" if failures > 1 else why


async def _first(event: asyncio.Event, timeout_s: float) -> None:
    """Wait for the event, and no longer than so."""
    try:
        await asyncio.wait_for(event.wait(), timeout_s if timeout_s < math.inf else None)
    except TimeoutError:
        pass


async def _patiently(ask: Callable[[], Awaitable[str]], what: str, timeout: Seconds) -> tuple[str, bool]:
    """(why there was no answer, or ""; whether this process was stopped meanwhile)"""
    asking = asyncio.ensure_future(ask())
    left_s, stopped = float(timeout), False
    try:
        while left_s > 0:
            span_s, began = min(left_s, _SPAN_S), time.monotonic()
            done, _ = await asyncio.wait([asking], timeout=span_s)
            if done:
                return asking.result(), stopped
            if time.monotonic() > began + span_s + _STOPPED_S:
                left_s, stopped = float(timeout), True  # whoever was asked was perhaps stopped too: all over again
            else:
                left_s -= span_s
        return f"no answer on {what} in {timeout}", stopped
    finally:
        asking.cancel()
