"""`llmos upgrade`: replace the daemon's program by the one that is installed now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from llmos.cli.output import clean, say
from llmos.cli.session import with_daemon

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@with_daemon
async def command(client: AsyncClient) -> None:
    """Replace the daemon's program by the one that is installed now.

    The same process goes on with the new code: workers, requests and connections stay. A new program that does not
    work is refused, and the old one goes on. Worker hosts and the gateway keep their code until they are restarted.
    """
    before, started = await client.status(), time.monotonic()
    after = await client.upgrade()
    versions = f"{before.version} -> {after.version}" if before.version != after.version else after.version
    say(f"llmosd {clean(versions)}, pid {after.pid}, serves again after {time.monotonic() - started:.1f} s.")
