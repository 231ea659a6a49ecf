"""The `llmos` command from outside, and the models that its tests run it on."""

from __future__ import annotations

import json
from typing import Any

from machine import SIMULATED, Machine

SLOW = """
model = "slow"
aliases = ["snail"]
[engine]
driver = "simulated"
load_time = 0
decode_rate = 5
[limits]
slots = 1
"""
#: It says why, and gives up at once.
DYING = """
model = "dying"
[engine]
driver = "openai"
command = ["sh", "-c", "echo tuning the strings; echo the bow is broken; exit 3"]
[restart]
policy = "no"
"""
ESCAPE = "\x1b"
MODELS = (SIMULATED, SLOW, DYING)


def done(machine: Machine, *args: str, stdin: str = "") -> str:
    """What a command that succeeds prints."""
    result = machine.llmos(*args, stdin=stdin)
    assert result.returncode == 0, result.stderr
    assert ESCAPE not in result.stdout
    return result.stdout


def fails(machine: Machine, code: int, *args: str, stdin: str = "") -> str:
    """What a command that fails says: lines that begin with its name, and no traceback."""
    result = machine.llmos(*args, stdin=stdin)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert any(line.startswith("llmos: ") for line in result.stderr.splitlines())
    return result.stderr


def rows(machine: Machine, *args: str) -> Any:
    return json.loads(done(machine, *args, "-o", "json"))
