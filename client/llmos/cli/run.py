"""`llmos run`: have a model complete a prompt, and show the text while it is made."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from llmos.cli.names import completing
from llmos.cli.output import clean, is_terminal, say_json
from llmos.cli.session import with_daemon
from llmos.types import Completion

if TYPE_CHECKING:
    from llmos.aio import AsyncClient


def _read_prompt(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> str:
    """The prompt's text. Read here, before there is an event loop: Ctrl-C could not end a read inside one."""
    if ctx.resilient_parsing:
        return ""  # A shell completes the line.
    if words and words != ("-",):
        return " ".join(words)
    if not words and is_terminal(sys.stdin):
        raise click.UsageError("There is no prompt. Give one, or - to read it from stdin", ctx)
    return sys.stdin.read().removesuffix("\n")


@click.command()
@click.argument("model", shell_complete=completing(models=True))
@click.argument("prompt", nargs=-1, callback=_read_prompt)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Generate no more than this.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text and counts, at the end.")
@click.option("--no-stream", is_flag=True, help="Print the text when it is complete.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Give up after this.")
@with_daemon
async def command(
    client: AsyncClient,
    model: str,
    prompt: str,
    chat: bool,
    as_json: bool,
    no_stream: bool,
    timeout: float | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
) -> None:
    """Have MODEL complete PROMPT.

    Without PROMPT, or when it is "-", it is read from stdin. The text is shown while it is made.
    """
    params: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    if no_stream or as_json:
        whole = await client.run(model, prompt, chat=chat, timeout=timeout, **params)
        if as_json:
            say_json(_summary(model, whole))
        else:
            _write(whole.text)
            _end(whole.text)
        return
    last = ""
    async with client.run(model, prompt, stream=True, chat=chat, timeout=timeout, **params) as pieces:
        async for piece in pieces:
            _write(piece.text)
            last = piece.text or last
    _end(last)


def _summary(model: str, whole: Completion) -> dict[str, object]:
    return {
        "model": model,
        "text": whole.text,
        "finish_reason": whole.finish_reason,
        "prompt_tokens": whole.prompt_tokens,
        "completion_tokens": whole.completion_tokens,
        "tokens_exact": whole.tokens_exact,
    }


def _write(text: str) -> None:
    """Into a file or a pipe it goes as it is; a terminal would obey what is in it."""
    sys.stdout.write(clean(text, keep="\n\t") if is_terminal() else text)
    sys.stdout.flush()


def _end(last: str) -> None:
    if not last.endswith("\n"):
        sys.stdout.write("\n")
