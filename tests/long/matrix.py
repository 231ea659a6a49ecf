"""The failpoint matrix: its cells, what must be true of the target after each, and the table of what was seen.

The target is the worker that something is done to while the daemon dies. How its life ended is told exactly where
somebody could know: the daemon that reaped it had put that on record, or the next one saw it end. It is unknown where
it ended while there was no daemon, and never 0 then.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import pytest

from llmosd.failpoint import NAMES

#: What `ps` says of how a worker's last life ended.
CLEAN, KILLED, TERMED, UNKNOWN = "exit code 0", "killed by signal 9", "killed by signal 15", "exit status unknown"
NOTHING = ""
#: No daemon knows of such a worker.
ABSENT = ""


class Cell(NamedTuple):
    """The daemon dies at `failpoint` while the target is in `state` and `operation` is done to it."""

    failpoint: str
    state: str
    operation: str


class Outcome(NamedTuple):
    """What becomes of the target under the next daemon: any of `states`, and any of `exits` in `ps`."""

    states: set[str]
    exits: set[str]


SPAWN = [name for name in NAMES if name.startswith("spawn.")]
STOP = [name for name in NAMES if name.startswith("stop.")]
ENDS = [name for name in NAMES if name.startswith(("kill.", "exit.", "empty."))]
ADOPT = [name for name in NAMES if name.startswith("adopt.")]
UPGRADE = [name for name in NAMES if name.startswith("upgrade.")]

CELLS = [
    *(Cell(name, state, "start") for name in SPAWN for state in ("stopped", "backoff")),
    *(Cell(name, state, "stop") for name in STOP for state in ("loading", "ready", "busy", "frozen")),
    *(Cell(name, state, "kill") for name in ENDS for state in ("loading", "ready", "busy", "frozen", "draining")),
    *(Cell(name, state, "stop") for name in ENDS for state in ("loading", "ready", "busy", "frozen")),
    *(Cell(name, state, "restart") for name in ADOPT for state in ("loading", "ready", "busy", "frozen", "draining")),
    *(Cell("models.read", state, "restart") for state in ("ready", "busy", "draining")),
    *(Cell("held.kept", state, "stop") for state in ("loading", "ready", "busy", "frozen")),
    Cell("held.kept", "held", "start"),
    *(Cell(name, state, "upgrade") for name in UPGRADE for state in ("loading", "ready", "busy", "frozen", "draining")),
    Cell("ready.recorded", "stopped", "start"),
    Cell("apply.kept", "ready", "apply"),
    Cell("apply.kept", "stopped", "apply"),
]


def outcome(cell: Cell) -> Outcome:
    """What must become of the target, whose policy is to be restarted always."""
    failpoint, state, operation = cell
    # Its process lives through it: what it was doing, it goes on with.
    goes_on = {"draining": Outcome({"stopped"}, {CLEAN}), "frozen": Outcome({"frozen"}, {NOTHING})}
    lives = goes_on.get(state, Outcome({"ready"}, {NOTHING}))
    if operation == "apply":
        # It was about to be ended to start anew; the file that says so was not kept.
        changing = Outcome({"ready", "stopped"}, {NOTHING, CLEAN, UNKNOWN})
        return changing if state == "ready" else Outcome({ABSENT}, {NOTHING})
    if failpoint == "empty.forgotten" and (operation == "stop" or state == "draining"):
        return Outcome({"stopped"}, {NOTHING})  # held: that is on file
    if failpoint in ("empty.forgotten", "spawn.gated", "spawn.grouped"):
        # There is, or was, no process, and no record of one. A request that comes back has one started.
        return Outcome({"ready", ABSENT} if state == "busy" else {ABSENT}, {NOTHING})
    if operation in ("restart", "upgrade") or (operation, failpoint) == ("kill", "kill.before"):
        return lives
    if state == "held":
        # An operator has let it go, and it was not started yet; but he asks again if he was not answered.
        return Outcome({"ready", ABSENT}, {NOTHING})
    if operation == "start":
        # On record and not told to go, it ends at its gate; nobody sees how.
        return Outcome({"ready"}, {UNKNOWN if failpoint == "spawn.recorded" else NOTHING})
    if operation == "stop":
        # Signalled, it may end before the next daemon is there, or by that one's signal when it has all but ended.
        return Outcome({"stopped"}, {CLEAN, TERMED, UNKNOWN} if failpoint == "stop.signalled" else {CLEAN})
    # Killed, it may have been seen to end before the daemon comes to its failpoint, and not after it.
    exits = {KILLED, UNKNOWN} if failpoint == "kill.sent" else {KILLED}
    return Outcome({"stopped"} if state == "draining" else {"ready"}, exits)


def told(cell: Cell, last_exit: str) -> str:
    """In which column of the table a cell counts."""
    if last_exit == NOTHING:
        return "off the record" if cell.failpoint == "empty.forgotten" else "no exit"
    return "unknown" if last_exit == UNKNOWN else "exact"


def summary(reports: Iterable[pytest.TestReport]) -> list[str]:
    """The matrix in figures, one line of them first."""
    rows: defaultdict[str, Counter[str]] = defaultdict(Counter)
    states: set[str] = set()
    results: Counter[str] = Counter()
    for report in reports:
        properties = dict(report.user_properties)
        if "cell" in properties:
            cell = Cell(*str(properties["cell"]).split())
            results[report.outcome] += 1
            states.add(cell.state)
            rows[cell.failpoint][str(properties.get("told", "not seen"))] += 1
    if not rows:
        return []
    total = sum(rows.values(), Counter[str]())
    columns = [name for name in ("exact", "unknown", "off the record", "no exit", "not seen") if total[name]]
    lines = [
        f"failpoint matrix: {sum(results.values())} cells over {len(rows)} failpoints and {len(states)} states, "
        + ", ".join(f"{count} {result}" for result, count in sorted(results.items(), reverse=True))
        + "; exit codes: "
        + ", ".join(f"{name} in {total[name]}" for name in columns),
        f"  {'failpoint':<17}" + "".join(f"{name:>16}" for name in columns),
    ]
    lines += [
        f"  {name:<17}" + "".join(f"{rows[name][c] or '·':>16}" for c in columns) for name in NAMES if name in rows
    ]
    return lines
