"""Model files for the system tests: real engines, with short timeouts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

ENGINES = Path(__file__).with_name("engines")

#: A worker that fails comes back soon, and gives up soon.
SHORT = """
[restart]
delay = "200ms"
delay_max = "1s"
[timeouts]
start = "20s"
load = "20s"
drain = "1s"
stop = "1s"
"""


def gemma(weights: Path, *, name: str = "gemma", slots: int = 2, engine: str = "", rest: str = SHORT) -> str:
    return f"""
model = "{name}"
[engine]
driver = "llamacpp"
weights = "{weights}"
context = 1024
threads = 1
{engine}
[limits]
slots = {slots}
{rest}
"""


def openai(
    name: str = "stub", script: str = "openai_like.py", *args: str, slots: int = 2, engine: str = "", rest: str = SHORT
) -> str:
    """A model whose engine is one of the scripts; it gets `--port`, and `args`."""
    command = [sys.executable, str(ENGINES / script), *(args or ("--port", "{port}"))]
    return served_by(command, name=name, slots=slots, engine=engine, rest=rest)


def served_by(command: Sequence[str], *, name: str, slots: int = 2, engine: str = "", rest: str = SHORT) -> str:
    return f"""
model = "{name}"
[engine]
driver = "openai"
command = {json.dumps(list(command))}
{engine}
[limits]
slots = {slots}
{rest}
"""


def command(argv: Sequence[str], *, name: str, engine: str = "", rest: str = SHORT) -> str:
    return f"""
model = "{name}"
[engine]
driver = "command"
command = {json.dumps(list(argv))}
{engine}
{rest}
"""


def simulated(
    name: str = "sim",
    *,
    slots: int = 4,
    decode_rate: float = 200,
    engine: str = "",
    limits: str = "",
    rest: str = SHORT,
) -> str:
    return f"""
model = "{name}"
[engine]
driver = "simulated"
load_time = "20ms"
decode_rate = {decode_rate}
{engine}
[limits]
slots = {slots}
{limits}
{rest}
"""
