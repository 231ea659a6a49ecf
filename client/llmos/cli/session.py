"""How a verb gets at the daemon: a client for the time that it takes. For the verbs; knows none of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec

import click

if TYPE_CHECKING:
    from llmos.aio import AsyncClient

P = ParamSpec("P")


class Session:
    """What the options before the verb say."""

    def __init__(self, host: str | None) -> None:
        self.host = host

    def run(self, work: Callable[[AsyncClient], Awaitable[int | None]]) -> int | None:
        async def connected() -> int | None:
            from llmos.aio import AsyncClient

            async with AsyncClient(self.host) as client:
                return await work(client)

        return asyncio.run(connected())


def with_daemon(verb: Callable[Concatenate[AsyncClient, P], Awaitable[int | None]]) -> Callable[P, int | None]:
    """A verb's coroutine as click calls it: its first argument is the client, its result the exit code."""

    @wraps(verb)
    def command(*args: P.args, **kwargs: P.kwargs) -> int | None:
        session = click.get_current_context().find_object(Session)
        assert session is not None
        return session.run(lambda client: verb(client, *args, **kwargs))

    return command
