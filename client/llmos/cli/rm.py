"""`llmos rm`: forget a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmos.cli.names import completing
from llmos.cli.output import clean, say
from llmos.cli.session import with_daemon

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@click.argument("model", shell_complete=completing(models=True))
@with_daemon
async def command(client: AsyncClient, model: str) -> None:
    """Forget a model.

    Its workers are stopped, and its file in models.d is deleted.
    """
    done = await client.remove(model)
    say(clean(done.message or f"{model} is removed."))
