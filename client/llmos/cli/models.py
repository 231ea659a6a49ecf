"""`llmos models`: what may run here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from llmos.cli.output import coloured_state, complain, number, output_option, say, say_json, size, table, terminal_width
from llmos.cli.session import with_daemon

if TYPE_CHECKING:
    from llmos.aio import AsyncClient

_RIGHT: Final = ("WORKERS", "RUNNING", "QUEUE", "CPUS", "MEMORY", "GPU MEM", "SLOTS")


@click.command()
@click.option("-v", "--verbose", is_flag=True, help="Also aliases, slots, files and what is required.")
@output_option
@with_daemon
async def command(client: AsyncClient, verbose: bool, output: str) -> None:
    """Show the models and services.

    WORKERS are those that are ready, and the most there may be.
    """
    models = await client.models()
    if output == "json":
        say_json(models)
        return
    if not models:
        complain("there is no model. `llmos apply FILE` adds one.")
        return
    columns = {
        "MODEL": [m.name for m in models],
        "STATE": [m.state for m in models],
        "DRIVER": [m.driver for m in models],
        "WORKERS": [f"{m.workers_ready}/{m.workers_max}" for m in models],
        "RUNNING": [str(m.requests_running) for m in models],
        "QUEUE": [str(m.queue) for m in models],
        "CPUS": [number(m.cpus) for m in models],
        "MEMORY": [size(m.memory_bytes) for m in models],
        "GPU MEM": [size(m.gpu_memory_bytes) for m in models],
    }
    if verbose:
        columns["KIND"] = [m.kind for m in models]
        columns["SLOTS"] = [str(m.slots) for m in models]
        columns["REQUIRES"] = [",".join(m.requires) for m in models]
        columns["ALIASES"] = [",".join(m.aliases) for m in models]
        columns["FILE"] = [m.file for m in models]
    columns["WHY"] = [m.why for m in models]
    rows = list(zip(*columns.values(), strict=True))
    paint = {"STATE": coloured_state}
    say(table(tuple(columns), rows, right=_RIGHT, cut="WHY", paint=paint, width=terminal_width()))
