"""`llmos completion`: the script with which a shell completes verbs, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_WHERE = {
    "bash": 'eval "$(llmos completion bash)"      in ~/.bashrc',
    "zsh": 'eval "$(llmos completion zsh)"       in ~/.zshrc',
    "fish": "llmos completion fish | source       in ~/.config/fish/config.fish",
}


@click.command(epilog="\b\n" + "\n".join(_WHERE.values()))
@click.argument("shell", type=click.Choice(list(_WHERE)))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    Verbs and options are completed, and while the daemon answers the names of models and workers.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "llmos", "_LLMOS_COMPLETE").source())
