"""`llmos top`: the workers, again and again."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import click

from llmos.cli.output import clean, is_terminal, say, span
from llmos.cli.ps import request_table, worker_table
from llmos.cli.session import with_daemon

if TYPE_CHECKING:
    from llmos.aio import AsyncClient

#: Cursor to the upper left corner, and nothing below it.
_CLEAR: Final = "\x1b[H\x1b[2J"


@click.command()
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="End after N times.")
@click.option("-T", "--requests", is_flag=True, help="Also the requests in flight.")
@with_daemon
async def command(client: AsyncClient, count: int | None, requests: bool) -> None:
    """Show the workers, again and again.

    Whenever something changes, at most once a second. Ctrl-C ends it.
    """
    shown = 0
    async with aclosing(client.watch()) as lists:
        async for workers in lists:
            status = await client.status()
            calls = await client.requests() if requests else ()
            parts = [
                f"llmosd {clean(status.version)}, up {span(status.uptime)}: {status.workers} workers, "
                f"{status.requests_running} requests running, {status.requests_waiting} waiting",
                worker_table(workers) if workers else "No worker runs.",
            ]
            if calls:
                parts.append(request_table(calls))
            say((_CLEAR if is_terminal() else "") + "\n\n".join(parts))
            shown += 1
            if shown == count:
                return
