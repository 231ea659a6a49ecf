"""`llmos status`: what the daemon is and how it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmos.cli.output import clean, coloured_state, output_option, say, say_json, size, span
from llmos.cli.session import with_daemon

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


@click.command()
@output_option
@with_daemon
async def command(client: AsyncClient, output: str) -> None:
    """Show what the daemon is and how it does."""
    status = await client.status()
    if output == "json":
        say_json(status)
        return
    lines = {
        "llmosd": f"{clean(status.version)}, {coloured_state(clean(status.state))} for {span(status.uptime)}",
        "process": f"pid {status.pid}, user {clean(status.user)}, "
        f"{size(status.memory_bytes)} of memory, {status.cpu_seconds:.1f} s of CPU",
        "models": f"{status.models}, {status.workers} workers",
        "requests": f"{status.requests_running} running, {status.requests_waiting} waiting",
        "confinement": clean(status.confinement),
        "gateway": clean(status.gateway_url) or "switched off",
        "bus": clean(status.bus_address),
        "model files": clean(status.models_directory),
        "logs": clean(status.log_directory),
        "runtime": clean(status.runtime_directory),
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        say(f"{name:>{width}}: {value}")
    if status.counters:
        counted = ", ".join(f"{clean(name)} {count}" for name, count in sorted(status.counters.items()) if count)
        say(f"{'counted':>{width}}: {counted or 'nothing yet'}")
