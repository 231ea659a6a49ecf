"""`llmos events`: what happened."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import click

from llmos.cli.output import clean, coloured_state, output_option, say, say_json_line
from llmos.cli.session import with_daemon
from llmos.types import Event

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens.")
@click.option("-n", "--lines", type=click.IntRange(min=1), metavar="N", help="The last N only; not with -f.")
@output_option
@with_daemon
async def command(client: AsyncClient, follow: bool, lines: int | None, output: str) -> None:
    """Show what happened, oldest first.

    JSON is one object a line.
    """
    if follow and lines is not None:
        raise click.UsageError("-n and -f do not go together")
    show = say_json_line if output == "json" else _show
    if lines is None:
        async for event in client.events(follow=follow):
            show(event)
    else:
        last: deque[Event] = deque(maxlen=lines)
        async for event in client.events():
            last.append(event)
        for event in last:
            show(event)


def _show(event: Event) -> None:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    kind = coloured_state(event.kind) + " " * max(0, 10 - len(event.kind))
    say(f"{at}  {kind}  {clean(event.subject)}  {clean(event.message)}".rstrip())
