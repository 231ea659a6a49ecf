"""The `llmos` command: see and steer llmosd, and ask its models. A verb a file, each loaded when it is used.

`main` is the only door: it turns every failure into one line on stderr and an exit code, see `exits`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

import click

from llmos.cli import exits
from llmos.cli.output import complain
from llmos.cli.session import Session
from llmos.errors import LlmosError

#: In the order in which help shows them. Each is a module here, with the command in `command`.
VERBS: Final = (
    "ps", "run", "models", "apply", "rm", "reload", "upgrade", "start", "stop", "restart", "reset", "kill", "limits",
    "logs", "events", "top", "devices", "status", "doctor", "completion",
)  # fmt: skip


class Verbs(click.Group):
    """The verbs, imported one by one: `llmos ps` does not pay for `llmos top`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = import_module(f"llmos.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # Whoever read stdout has enough. What is still buffered must not fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return exits.PIPE_CLOSED


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--host",
    metavar="DIR",
    help="The daemon's runtime directory.  [default: LLMOS_HOST, or the user's, or the system's]",
)
@click.version_option(package_name="llmosd", prog_name="llmos")
@click.pass_context
def cli(ctx: click.Context, host: str | None) -> None:
    """See and steer llmosd, an operating system for model workers, and ask its models.

    NAME is a worker's, a model's or an alias's. Exit codes: 0 done, 1 failed, 2 usage, 3 no daemon, 4 no such thing,
    5 refused.
    """
    ctx.obj = Session(host)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    # gRPC writes what the user is told anyway, and more, to stderr.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        code = cli.main(args=args, prog_name="llmos", standalone_mode=False)
        return int(code or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return exits.USAGE
    except click.UsageError as error:
        hint = f" See `{error.ctx.command_path} --help`." if error.ctx else ""
        complain(f"{error.format_message().rstrip('.')}.{hint}")
        return exits.USAGE
    except click.ClickException as error:
        complain(error.format_message())
        return exits.FAILED
    except LlmosError as error:
        complain(str(error))
        return exits.code_of(error)
    except (click.Abort, KeyboardInterrupt):
        return exits.INTERRUPTED
