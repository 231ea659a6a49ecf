"""`llmos doctor`: what this machine can and cannot enforce, and how to get the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmos.cli.output import clean, coloured_state, output_option, say, say_json, table
from llmos.cli.session import with_daemon

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@output_option
@with_daemon
async def command(client: AsyncClient, output: str) -> None:
    """Check what this machine can enforce.

    What it cannot, and how to get the rest, is said too.
    """
    checks = await client.doctor()
    if output == "json":
        say_json(checks)
        return
    rows = [(check.name, check.result, check.message) for check in checks]
    say(table(("CHECK", "RESULT", "FOUND"), rows, paint={"RESULT": coloured_state}))
    advice = [check for check in checks if check.advice]
    if advice:
        say("\nTo get the rest:")
    for check in advice:
        say(f"  {clean(check.name)}: {clean(check.advice)}")
