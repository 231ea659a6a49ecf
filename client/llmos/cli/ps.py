"""`llmos ps`: the workers, or with -T the requests in flight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from llmos.cli.names import completing
from llmos.cli.output import NONE, coloured_state, complain, number, say, say_json, size, span, table, terminal_width
from llmos.cli.session import with_daemon
from llmos.types import Request, Worker

if TYPE_CHECKING:
    from llmos.aio import AsyncClient

#: A WHY longer than this stands at the end of the line, where it pushes nothing away.
WHY_CHARS_INLINE: Final = 20
#: Of a request's id, so much is shown: `llmos kill` takes a beginning.
ID_CHARS: Final = 12

_RIGHT: Final = (
    "PID", "CPUS", "CPU%", "MEMORY", "GPU MEM", "SLOTS", "QUEUE", "RESTARTS", "UPTIME", "TOKENS", "AGE", "WAITED",
    "FIRST TOKEN", "ENGINE PID", "RESIDENT", "PROCESSES", "ATTEMPT", "PRIORITY", "PROMPT", "REMAINING",
)  # fmt: skip


@click.command()
@click.argument("name", default="", shell_complete=completing(models=True, workers=True))
@click.option("-a", "--all", "include_stopped", is_flag=True, help="Also workers without a process.")
@click.option("-T", "--requests", is_flag=True, help="The requests in flight, as ps -T shows threads.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "wide", "json"]), default="table", show_default=True,
    help="For people, with more columns, or for programs: bytes and seconds.",
)  # fmt: skip
@with_daemon
async def command(client: AsyncClient, name: str, include_stopped: bool, requests: bool, output: str) -> None:
    """Show the workers, or the requests in flight.

    With NAME, a worker's, a model's or an alias's, only those that belong to it.
    """
    if requests:
        calls = await client.requests(name)
        if output == "json":
            say_json(calls)
        elif calls:
            say(request_table(calls, wide=output == "wide"))
        else:
            complain("no request is in flight.")
        return
    workers = await client.ps(name, include_stopped=include_stopped)
    if output == "json":
        say_json(workers)
    elif workers:
        say(worker_table(workers, wide=output == "wide"))
    else:
        complain("no worker runs. `llmos ps -a` shows those that are down, `llmos models` what may be started.")


def worker_table(workers: Sequence[Worker], *, wide: bool = False) -> str:
    columns = {
        "WORKER": [w.name for w in workers],
        "MODEL": [w.model for w in workers],
        "PID": [str(w.pid or NONE) for w in workers],
        "STATE": [w.state for w in workers],
        "WHY": [why(w) for w in workers],
        "CPUS": [number(w.cpus) for w in workers],
        "CPU%": [f"{w.cpu_percent:.1f}" if w.pid else NONE for w in workers],
        "MEMORY": [size(w.memory_bytes) for w in workers],
        "GPU": [",".join(w.gpus) for w in workers],
        "GPU MEM": [size(w.gpu_memory_bytes) for w in workers],
        "SLOTS": [f"{w.slots_used}/{w.slots}" if w.slots else NONE for w in workers],
        "QUEUE": [str(w.queue) for w in workers],
        "RESTARTS": [str(w.restarts) for w in workers],
        "UPTIME": [span(w.uptime) for w in workers],
    }
    if wide:
        columns["DRIVER"] = [w.driver for w in workers]
        columns["OWN CPUS"] = [w.cpu_set for w in workers]
        columns["ENGINE PID"] = [str(w.engine_pid or NONE) for w in workers]
        columns["RESIDENT"] = [size(w.memory_resident_bytes) for w in workers]
        columns["PROCESSES"] = [str(w.processes or NONE) for w in workers]
        columns["LAST EXIT"] = [w.last_exit for w in workers]
    if wide or max(map(len, columns["WHY"])) > WHY_CHARS_INLINE:
        columns["WHY"] = columns.pop("WHY")
    return _table(columns, wide=wide, cut="WHY")


def why(worker: Worker) -> str:
    """Why it is in its state, and how far it has come. An engine that computes nothing is never shown as a real one."""
    words = [worker.why]
    if worker.state in ("loading", "waking", "starting") and 0 <= worker.progress < 1:
        words.insert(0, f"{worker.progress:.0%}")
    if worker.simulated:
        words.append("(simulated)")
    return " ".join(filter(None, words))


def request_table(requests: Sequence[Request], *, wide: bool = False) -> str:
    columns = {
        "REQUEST": [r.id if wide else r.id[:ID_CHARS] for r in requests],
        "MODEL": [r.model for r in requests],
        "WORKER": [r.worker for r in requests],
        "TENANT": [r.tenant for r in requests],
        "STATE": [r.state for r in requests],
        "TOKENS": [str(r.tokens) for r in requests],
        "AGE": [span(r.age) for r in requests],
        "WAITED": [span(r.waited) for r in requests],
        "FIRST TOKEN": [span(r.first_item) for r in requests],
    }
    if wide:
        columns["PROMPT"] = [str(r.prompt_tokens or NONE) for r in requests]
        columns["PRIORITY"] = [str(r.priority) for r in requests]
        columns["ATTEMPT"] = [str(r.attempt) for r in requests]
        columns["REMAINING"] = [span(r.remaining) for r in requests]
        columns["CLIENT"] = ["connected" if r.connected else "away" for r in requests]
        columns["PATH"] = [r.path for r in requests]
    return _table(columns, wide=wide, cut="TENANT")


def _table(columns: dict[str, list[str]], *, wide: bool, cut: str) -> str:
    rows = list(zip(*columns.values(), strict=True))
    width = None if wide else terminal_width()
    return table(tuple(columns), rows, right=_RIGHT, cut=cut, paint={"STATE": coloured_state}, width=width)
