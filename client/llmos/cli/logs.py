"""`llmos logs`: what a worker and its engine wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmos.cli.names import completing
from llmos.cli.output import clean, is_terminal
from llmos.cli.session import with_daemon

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@click.argument("worker", shell_complete=completing(workers=True))
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written, across restarts.")
@click.option("-n", "--lines", default="100", metavar="N|all", show_default=True, help="The last lines to begin with.")
@with_daemon
async def command(client: AsyncClient, worker: str, follow: bool, lines: str) -> None:
    """Show a worker's log, also a dead one's."""
    if lines != "all" and not (lines.isdecimal() and int(lines) > 0):
        raise click.BadParameter(f"{lines!r} is neither a number of lines nor 'all'.", param_hint="'-n'")
    count = -1 if lines == "all" else int(lines)
    async for line in client.logs(worker, lines=count, follow=follow):
        # Into a file or a pipe it goes as it is; a terminal would obey what is in it.
        click.echo(clean(line, keep="\t") if is_terminal() else line, color=True)
