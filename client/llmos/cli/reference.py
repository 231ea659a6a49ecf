"""Writes docs/cli.md from the command itself: `python -m llmos.cli.reference > docs/cli.md`. For `make docs`, tests."""

from __future__ import annotations

import sys
from typing import Final

import click

from llmos.cli import VERBS, cli

WIDTH: Final = 100

INTRODUCTION: Final = """\
# The `llmos` command

Generated from the command by `python -m llmos.cli.reference`; do not edit.

`llmos` shows and steers a running `llmosd`, and asks its models. It speaks to the daemon of this machine, which it
finds by its runtime directory: `--host DIR`, or `LLMOS_HOST`, else the user's (`$XDG_RUNTIME_DIR/llmosd`, or
`/tmp/llmosd-UID`), else the system's, `/run/llmosd`. Root looks in `/run/llmosd` only. A daemon that restarts is a
pause of a few seconds.

- **NAME** is a worker's (`gemma3-270m@1`), a model's or an alias's.
- **Tables** are for people: sizes in powers of 1024, `-` for nothing; on a terminal the last column is cut to fit.
- **`-o json`** is for programs: the same fields in bytes and seconds, named as in `proto/llmos/v1/control.proto`, where
  their meaning is. `events` gives one object a line.
- **Errors** go to stderr, as `llmos: what happened, and why. What to do.`
- **Colours** are for states, on a terminal, unless `NO_COLOR` is set. Control characters in what workers and clients
  wrote are shown as escapes.

| exit code | means |
|---|---|
| 0 | done |
| 1 | failed: a worker did not come up, an engine answered with an error, the time ran out |
| 2 | wrong usage |
| 3 | no daemon answers |
| 4 | there is no such model, worker or request |
| 5 | refused: not possible now, not understood, or not allowed |
| 130 | interrupted by Ctrl-C; a request that ran is cancelled |
| 141 | whoever read stdout closed it |
"""

EXAMPLES: Final = """\
## For example

```
llmos apply gemma3-270m.toml            # add a model
llmos run gemma3-270m "The capital of France is" --max-tokens 16
git diff | llmos run coder --chat -     # the prompt from stdin
llmos ps -T                             # what runs for whom
llmos limits gemma3-270m memory_max=2G  # while it runs
llmos kill 3f9a01c2                     # cancel a request, by the beginning of its id
llmos restart gemma3-270m && llmos logs -f gemma3-270m@1
llmos ps -o json | jq '.[] | select(.state == "failed") | .why'
eval "$(llmos completion bash)"         # completes verbs, options, and names of workers and models
```
"""


def markdown() -> str:
    """The whole page."""
    parts = [INTRODUCTION, EXAMPLES]
    root = click.Context(cli, info_name="llmos", terminal_width=WIDTH)
    for verb in VERBS:
        command = cli.get_command(root, verb)
        assert command is not None
        context = click.Context(command, info_name=verb, parent=root, terminal_width=WIDTH)
        context.help_option_names = ["-h", "--help"]
        parts.append(f"## llmos {verb}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(markdown())
