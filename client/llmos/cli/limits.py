"""`llmos limits`: what a worker may use, and changing it while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from llmos.cli.names import name_argument
from llmos.cli.output import clean, output_option, say, say_json, table, terminal_width
from llmos.cli.session import with_daemon
from llmos.types import WorkerLimits

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@name_argument
@click.argument("changes", nargs=-1, metavar="[NAME=VALUE]...")
@output_option
@with_daemon
async def command(client: AsyncClient, name: str, changes: tuple[str, ...], output: str) -> None:
    """Show limits, or change them live.

    For example `llmos limits gemma3-270m memory_max=2G cpu_weight=50`. An empty value gives a limit its default again.
    Limits set on a model are kept; those set on one worker last until it ends.
    """
    wanted: dict[str, str] = {}
    for change in changes:
        limit, equals, value = change.partition("=")
        if not equals or not limit:
            raise click.UsageError(f"{change!r} is no NAME=VALUE")
        wanted[limit] = value
    found = await (client.set_limits(name, wanted) if wanted else client.limits(name))
    if output == "json":
        say_json(found)
    else:
        say(_tables(found))


def _tables(found: Sequence[WorkerLimits]) -> str:
    parts = []
    for entry in found:
        rows = [(x.name, x.configured, x.in_force, x.enforced_by, x.used, x.peak) for x in entry.limits]
        headers = ("LIMIT", "CONFIGURED", "IN FORCE", "ENFORCED BY", "USED", "PEAK")
        limits = table(headers, rows, cut="ENFORCED BY", width=terminal_width())
        heading = entry.worker or f"{entry.model}, for workers to come"
        parts.append(f"{clean(heading)}:\n{limits}" if len(found) > 1 or not entry.worker else limits)
    return "\n\n".join(parts)
