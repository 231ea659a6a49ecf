"""Shell completion of names, from the daemon when it answers at once, else of nothing. For the verbs' arguments."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

import click
from click.shell_completion import CompletionItem

from llmos.errors import LlmosError

#: Who presses Tab does not wait longer.
PATIENCE_S: Final = 0.5

F = TypeVar("F", bound=Callable[..., object])
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def completing(*, models: bool = False, workers: bool = False) -> Complete:
    """What completes an argument with models' names, workers' names, or both."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        host = ctx.find_root().params.get("host")
        try:
            found = asyncio.run(_names(host, models, workers))
        except LlmosError:
            return []  # Nobody to ask, and a prompt is no place for complaints.
        return [CompletionItem(name) for name in sorted(found) if name.startswith(incomplete)]

    return complete


async def _names(host: str | None, models: bool, workers: bool) -> set[str]:
    from llmos.aio import AsyncClient

    names: set[str] = set()
    async with AsyncClient(host, patience=PATIENCE_S) as client:
        if models:
            for model in await client.models():
                names.update((model.name, *model.aliases))
        if workers:
            names.update(worker.name for worker in await client.ps(include_stopped=True))
    return names


def name_argument(verb: F) -> F:
    """NAME: a worker's, a model's or an alias's."""
    return click.argument("name", shell_complete=completing(models=True, workers=True))(verb)
