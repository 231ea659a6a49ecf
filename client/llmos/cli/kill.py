"""`llmos kill`: send a signal to workers, or cancel a request."""

from __future__ import annotations

import signal as signals
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from llmos.cli.names import name_argument
from llmos.cli.output import clean, say
from llmos.cli.session import with_daemon
from llmos.errors import Invalid
from llmos.signals import signal_number

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


class SignalType(click.ParamType[int]):
    """A signal's name or number."""

    name = "signal"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return signal_number(value if isinstance(value, int) else str(value))
        except Invalid as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = (name.name.removeprefix("SIG") for name in signals.Signals)
        return [CompletionItem(name) for name in names if name.startswith(incomplete.upper().removeprefix("SIG"))]


@click.command()
@click.option("-s", "--signal", type=SignalType(), default="TERM", show_default=True, help="Its name or number.")
@name_argument
@with_daemon
async def command(client: AsyncClient, signal: int, name: str) -> None:
    """Send a signal, or cancel a request.

    NAME may be a request's id, or its beginning: that request is cancelled. Else its workers get the
    signal: KILL goes to the whole process group, STOP and CONT freeze and thaw it, others go to its leader.
    """
    done = await client.kill(name, signal)
    if done.workers:
        say(f"{signals.Signals(signal).name} went to {clean(', '.join(done.workers))}.")
    else:
        say(clean(done.message) or f"Request {clean(name)} is cancelled.")
