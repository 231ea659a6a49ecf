"""What the command prints: tables for people, JSON for programs, complaints. For the verbs.

Everything that comes from outside goes through `clean` before it reaches a terminal.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import click
import msgspec

#: Control characters, line separators that Unicode has besides them, and what turns the writing's direction around.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
#: A cell that may be cut is never made narrower than this.
NARROWEST_CELL_CHARS: Final = 12
NONE: Final = "-"

_STATE_COLOURS: Final = {
    "ready": "green", "running": "green", "ok": "green", "done": "green",
    "starting": "yellow", "loading": "yellow", "waking": "yellow", "draining": "yellow", "stopping": "yellow",
    "backoff": "yellow", "waiting": "yellow", "blocked": "yellow", "adopted": "yellow", "limited": "yellow",
    "failed": "red", "unkillable": "red", "missing": "red", "expired": "red", "rejected": "red",
    "frozen": "cyan", "asleep": "cyan",
}  # fmt: skip

output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True,
    help="For people, or for programs: bytes and seconds.",
)  # fmt: skip


def clean(text: str, keep: str = "") -> str:
    """With control characters written as escapes, but for those in `keep`."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def is_terminal(stream: Any = None) -> bool:
    return bool((stream or sys.stdout).isatty())


def say(line: str) -> None:
    """A line on stdout, from the command itself or already clean."""
    click.echo(line, color=True)


def complain(message: str) -> None:
    """What happened, why, and what to do, on stderr."""
    click.echo(f"llmos: {clean(message, keep=chr(10))}", err=True)


def say_json(value: Any) -> None:
    """Indented JSON on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def say_json_line(value: Any) -> None:
    """JSON on one line of stdout, for endless lists."""
    click.echo(msgspec.json.encode(value).decode())


def coloured_state(state: str) -> str:
    """A state, in its colour where colours are wanted: on a terminal, unless NO_COLOR is set (no-color.org)."""
    colour = _STATE_COLOURS.get(state)
    if colour is None or os.environ.get("NO_COLOR") or not is_terminal():
        return state
    return click.style(state, fg=colour)


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    cut: str = "",
    paint: Mapping[str, Callable[[str], str]] = {},
    width: int | None = None,
) -> str:
    """A plain table. `right`: columns set to the right; `cut`: the one that is shortened to fit `width`; `paint`:
    what colours a column's cells once their width is settled.
    """
    from tabulate import tabulate  # costs more than the rest of the command together

    cells = [[clean(cell) or NONE for cell in row] for row in rows]
    if width is not None and cut in headers:
        _fit(headers, cells, headers.index(cut), width)
    for column, header in enumerate(headers):
        if header in paint:
            for row in cells:
                row[column] = paint[header](row[column])
    align = ["right" if header in right else "left" for header in headers]
    # The headers go in as a row: as headers they would be padded by two more columns.
    text = tabulate([list(headers), *cells], tablefmt="plain", disable_numparse=True, colalign=align)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _fit(headers: Sequence[str], cells: list[list[str]], cut: int, width: int) -> None:
    widths = [max(len(header), *(len(row[column]) for row in cells), 0) for column, header in enumerate(headers)]
    over = sum(widths) + 2 * (len(widths) - 1) - width
    room = max(NARROWEST_CELL_CHARS, widths[cut] - over)
    if over > 0:
        for row in cells:
            if len(row[cut]) > room:
                row[cut] = f"{row[cut][: room - 1]}…"


def terminal_width() -> int | None:
    """Columns of the terminal on stdout, or None when it is none: then nothing is cut."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def size(value: float) -> str:
    """Bytes, as model files write them: powers of 1024."""
    for unit, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if value >= factor:
            number = value / factor
            return f"{number:.0f}{unit}" if number >= 100 else f"{number:.1f}{unit}"
    return f"{value:.0f}B" if value else NONE


def span(seconds: float) -> str:
    """A time, in its two largest units."""
    if seconds <= 0:
        return NONE
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    whole = int(seconds)
    for name, unit, smaller_name, smaller in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= unit:
            return f"{whole // unit}{name}{whole % unit // smaller:02d}{smaller_name}"
    return f"{whole}s"


def number(value: float) -> str:
    """A count that need not be whole: CPUs."""
    return f"{value:g}" if value else NONE
