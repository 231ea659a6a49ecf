"""`llmos reload`: have the daemon read models.d again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmos.cli import exits
from llmos.cli.output import clean, complain, say
from llmos.cli.session import with_daemon

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@with_daemon
async def command(client: AsyncClient) -> int:
    """Have the daemon read models.d again.

    Files that are wrong are named, and change nothing; all others are in force.
    """
    done = await client.reload()
    for verb, names in (("Applied", done.applied), ("Removed", done.removed)):
        if names:
            say(f"{verb}: {clean(', '.join(names))}.")
    for refusal in done.refused:
        complain(refusal)
    if not (done.applied or done.removed or done.refused):
        say("Nothing has changed.")
    return exits.REFUSED if done.refused else 0
