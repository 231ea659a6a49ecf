"""`llmos reset`: clear `failed`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmos.cli.names import name_argument
from llmos.cli.session import with_daemon
from llmos.cli.waiting import UP, carry_out, waiting_options

if TYPE_CHECKING:
    from llmos.aio import AsyncClient

#: Every state that is no failure's.
CLEARED = (*UP, "stopped", "starting", "loading", "draining", "waking", "stopping", "adopted")


@click.command()
@name_argument
@waiting_options
@with_daemon
async def command(client: AsyncClient, name: str, no_wait: bool, timeout: float) -> None:
    """Forget that NAME failed.

    It may be started again then, by an operator or by the next request.
    """
    await carry_out(
        client, client.reset(name), states=CLEARED, dead_ends=("unkillable",), no_wait=no_wait, timeout=timeout
    )
