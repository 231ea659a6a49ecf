"""`llmos devices`: what this machine has, and who has it reserved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmos.cli.output import complain, number, output_option, say, say_json, size, table, terminal_width
from llmos.cli.session import with_daemon
from llmos.types import Device

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@output_option
@with_daemon
async def command(client: AsyncClient, output: str) -> None:
    """Show CPUs, memory and GPUs.

    How much there is, how much is reserved for workers, and how much is used.
    """
    found = await client.devices()
    if output == "json":
        say_json(found)
        return
    headers = ("KIND", "ID", "NAME", "TOTAL", "RESERVED", "USED", "WORKERS", "PROPERTIES")
    rows = [_row(device) for device in found.devices]
    right = ("TOTAL", "RESERVED", "USED")
    say(table(headers, rows, right=right, cut="PROPERTIES", width=terminal_width()))
    for note in found.notes:
        complain(note)


def _row(device: Device) -> tuple[str, ...]:
    shown = number if device.kind == "cpu" else size
    figures = (shown(device.total), shown(device.reserved), shown(device.used))
    properties = " ".join(f"{key}={value}" for key, value in sorted(device.properties.items()))
    return (device.kind, device.id, device.name, *figures, ",".join(device.workers), properties)
