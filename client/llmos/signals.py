"""Signals by name and number, as people write them. Pure."""

from __future__ import annotations

import signal

from llmos.errors import Invalid


def signal_number(wanted: int | str) -> int:
    """``9``, ``"9"``, ``"KILL"``, ``"kill"`` and ``"SIGKILL"`` are 9. Raises Invalid for what is no signal."""
    text = str(int(wanted)) if isinstance(wanted, int) else wanted.strip()
    try:
        if text.isdecimal():
            return signal.Signals(int(text)).value
        return signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"].value
    except (KeyError, ValueError):
        raise Invalid(
            f"{wanted!r} is no signal. Give a name such as TERM, or a number; `kill -l` lists them."
        ) from None
