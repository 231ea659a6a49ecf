"""`llmos restart`: end workers and run them again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmos.cli.names import name_argument
from llmos.cli.session import with_daemon
from llmos.cli.waiting import NOT_UP, UP, carry_out, waiting_options

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@name_argument
@waiting_options
@with_daemon
async def command(client: AsyncClient, name: str, no_wait: bool, timeout: float) -> None:
    """End NAME and run it again.

    It finishes its requests first. Those that require it are restarted with it. Comes back when it
    takes requests again, or has failed.
    """
    await carry_out(client, client.restart(name), states=UP, dead_ends=NOT_UP, no_wait=no_wait, timeout=timeout)
