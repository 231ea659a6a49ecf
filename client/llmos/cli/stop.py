"""`llmos stop`: end workers and keep them down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmos.cli.names import name_argument
from llmos.cli.session import with_daemon
from llmos.cli.waiting import carry_out, waiting_options

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@name_argument
@click.option("--now", is_flag=True, help="Do not wait for the requests that run.")
@waiting_options
@with_daemon
async def command(client: AsyncClient, name: str, now: bool, no_wait: bool, timeout: float) -> None:
    """End NAME and keep it down.

    It finishes its requests first, and those that require it end before it. Comes back when no process of it is left.
    It stays down, whoever restarts the daemon, until `llmos start` or the next boot.
    """
    stopping = client.stop(name, now=now)
    await carry_out(client, stopping, states=("stopped",), dead_ends=("unkillable",), no_wait=no_wait, timeout=timeout)
