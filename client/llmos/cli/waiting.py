"""Waiting for what a command has begun, as systemctl does, and saying what became of it. For start, stop and others."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import click

from llmos.cli.output import clean, coloured_state, complain, is_terminal, say
from llmos.errors import LlmosError, WorkerFailed
from llmos.types import Command, Worker

if TYPE_CHECKING:
    from llmos.aio import AsyncClient

#: Lines of a failed worker's log that are shown.
LOG_LINES: Final = 10
#: Longer than any model should load; the daemon's own time limits end most waiting before.
TIMEOUT_S: Final = 900.0
#: States in which a worker that was started has come up.
UP: Final = ("ready", "asleep", "frozen")
#: One failed attempt is a failed command, though the daemon tries again.
NOT_UP: Final = ("failed", "unkillable", "backoff", "stopped")

F = TypeVar("F", bound=Callable[..., object])


def waiting_options(function: F) -> F:
    """--no-wait and --timeout."""
    function = click.option("--no-wait", is_flag=True, help="Come back when the command is taken on.")(function)
    return click.option(
        "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", default=TIMEOUT_S,
        help=f"Wait no longer than this.  [default: {TIMEOUT_S:g}]",
    )(function)  # fmt: skip


async def carry_out(
    client: AsyncClient,
    command: Awaitable[Command],
    *,
    states: Collection[str],
    dead_ends: Collection[str],
    no_wait: bool,
    timeout: float,
) -> None:
    """Give a command, wait until its workers are in one of `states`, and say so. Raises what went wrong."""
    taken_on = await command
    if not taken_on.workers:
        say(clean(taken_on.message) or "There was nothing to do.")
        return
    if no_wait:
        say(clean(taken_on.message) or f"Taken on: {clean(', '.join(taken_on.workers))}.")
        return
    try:
        workers = await client.wait(
            taken_on.workers, states, dead_ends=dead_ends, timeout=timeout, on_change=_show_progress
        )
    except WorkerFailed as failure:
        _end_progress()
        await _show_log(client, failure.worker)
        raise
    finally:
        _end_progress()
    for worker in workers:
        pid = f", pid {worker.pid}" if worker.pid else ""
        say(f"{clean(worker.name)} is {coloured_state(worker.state)}{pid}.")
    for name in sorted(set(taken_on.workers) - {worker.name for worker in workers}):
        say(f"{clean(name)} is gone.")


def _show_progress(workers: Sequence[Worker]) -> None:
    """On a terminal only: one line that is written over."""
    if is_terminal(sys.stderr):
        parts = [f"{w.name}: {w.state}{f' {w.progress:.0%}' if 0 <= w.progress < 1 else ''}" for w in workers]
        click.echo(f"\r\x1b[K{clean(', '.join(parts))}", nl=False, err=True)


def _end_progress() -> None:
    if is_terminal(sys.stderr):
        click.echo("\r\x1b[K", nl=False, err=True)


async def _show_log(client: AsyncClient, worker: str) -> None:
    try:
        lines = [line async for line in client.logs(worker, lines=LOG_LINES)]
    except LlmosError as error:
        complain(f"the log of {worker} cannot be read: {error}")
        return
    for line in lines:
        click.echo(f"  | {clean(line, keep=chr(9))}", err=True)
