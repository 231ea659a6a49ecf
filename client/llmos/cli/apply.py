"""`llmos apply`: add models or change them, from model files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmos.cli import exits
from llmos.cli.output import clean, complain, say
from llmos.cli.session import with_daemon
from llmos.errors import DaemonUnreachable, LlmosError
from llmos.types import Command

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


def _read_stdin(ctx: click.Context, parameter: click.Parameter, source: Path) -> Path | str:
    """The text on stdin for "-". Read here, before there is an event loop: Ctrl-C could not end a read inside one."""
    return sys.stdin.read() if str(source) == "-" and not ctx.resilient_parsing else source


@click.command()
@click.argument(
    "source", type=click.Path(exists=True, allow_dash=True, path_type=Path), metavar="FILE|DIR", callback=_read_stdin
)
@with_daemon
async def command(client: AsyncClient, source: Path | str) -> int:
    """Add models or change them.

    From FILE, a model file, or stdin when it is "-"; from a DIR, all its *.toml.
    """
    if isinstance(source, str):
        _show("The model on stdin", await client.apply(source, file_name="stdin"))
        return 0
    if not source.is_dir():
        _show(str(source), await client.apply(source))
        return 0
    files = sorted(source.glob("*.toml"))
    if not files:
        complain(f"there is no *.toml in {source}. Give a model file, or a directory of them.")
        return exits.FAILED
    code = 0
    for file in files:
        try:
            _show(str(file), await client.apply(file))
        except DaemonUnreachable:
            raise
        except LlmosError as error:
            complain(str(error))
            code = code or exits.code_of(error)
    return code


def _show(source: str, done: Command) -> None:
    say(clean(done.message or f"{source} is applied."))
