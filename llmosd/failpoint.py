"""Named places at which a test may make the daemon fail: so that a crash test names a place, and need not hope for it.

After containerd's failpoints, and FreeBSD's fail(9). ``LLMOSD_FAILPOINTS`` holds ``name=terms`` pairs between ``;``.
Terms follow one another with ``->``; each is ``[COUNT*]ACTION``, and counts how often it applies before the next does:

- ``off``: nothing
- ``kill``: SIGKILL to this process
- ``error(text)``: OSError with that text
- ``delay(milliseconds)``: stand still

``spawn.recorded=1*off->kill`` lets the first worker be put on record, and dies at the second. ``@/path`` reads the same
from a file each time a failpoint is passed, so that a test can arm one when all is in place; counts then begin anew.
Without the variable, passing a failpoint costs one look-up in an empty dictionary.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path
from typing import Final

import msgspec

VARIABLE: Final = "LLMOSD_FAILPOINTS"
#: Every failpoint there is, and where it stands. A test goes through all of them.
NAMES: Final = {
    "spawn.gated": "the child waits at the gate; it is on no record",
    "spawn.grouped": "the child is in its group, and on no record",
    "spawn.recorded": "the child is on record, and was not told to go",
    "spawn.gone": "the child was told to go; the kernel does not know",
    "ready.recorded": "a command was found to be ready, and that is on record; the kernel does not know",
    "stop.recorded": "the intent to stop is on record, no signal was sent",
    "stop.signalled": "the leader was signalled",
    "kill.before": "the group is about to be killed",
    "kill.sent": "the group was killed, and is not yet seen empty",
    "exit.seen": "the leader's end was seen; the kernel does not know",
    "empty.seen": "the group is empty; its record is still there",
    "empty.forgotten": "the record is gone; the kernel does not know",
    "adopt.read": "a record was read, and its process not yet taken over",
    "adopt.taken": "a process was taken over; the kernel does not know",
    "models.read": "the model files are being read, in a thread",
    "upgrade.checked": "the new program has said that it works, and the old one still serves",
    "upgrade.closed": "the old program has let go of everything; the new one is not there",
    "held.kept": "what is stopped by operators is on file, and nothing was done about it",
    "apply.kept": "a model is in force, and its file is not yet kept",
}


class _Term(msgspec.Struct):
    """One step of a failpoint's script. `left` of -1: for ever."""

    action: str
    argument: str
    left: int


class FailpointError(ValueError):
    """LLMOSD_FAILPOINTS cannot be read."""


def parse(text: str) -> dict[str, list[_Term]]:
    """The scripts by name. Raises FailpointError for what is no script, or of no failpoint that there is."""
    scripts: dict[str, list[_Term]] = {}
    for part in filter(None, text.split(";")):
        name, equals, terms = part.partition("=")
        if not equals or name not in NAMES:
            raise FailpointError(f"{VARIABLE}: {name!r} is none of {', '.join(NAMES)}")
        scripts[name] = [_term(term) for term in terms.split("->")]
    return scripts


def _from_file(path: Path) -> dict[str, list[_Term]]:
    try:
        return parse(path.read_text().strip())
    except FileNotFoundError:
        return {}


def _term(text: str) -> _Term:
    match = re.fullmatch(r"(?:(\d+)\*)?(off|kill|error|delay)(?:\((.*)\))?", text.strip())
    if match is None or (match[2] == "delay" and not (match[3] or "").isdigit()):
        raise FailpointError(f"{VARIABLE}: {text!r} is not [COUNT*]off, kill, error(text) or delay(milliseconds)")
    return _Term(match[2], match[3] or "", int(match[1]) if match[1] else -1)


_variable: Final = os.environ.get(VARIABLE, "")
_file: Final = Path(_variable[1:]) if _variable.startswith("@") else None
_scripts: Final = parse("" if _file else _variable)


def failpoint(name: str) -> None:
    """Here a test may make this process fail. Raises OSError when it is told to."""
    script = _from_file(_file).get(name) if _file else _scripts.get(name)
    if not script:
        return
    term = script[0]
    if term.left > 0:
        term.left -= 1
        if term.left == 0:
            script.pop(0)
    if term.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif term.action == "error":
        raise OSError(errno.EIO, term.argument or f"failpoint {name}")
    elif term.action == "delay":
        time.sleep(int(term.argument) / 1000)
