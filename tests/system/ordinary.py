"""A daemon that is not root's, whoever runs the tests. It may not make cgroups: its groups are found by their mark."""

from __future__ import annotations

import os
import shutil

from machine import Machine

NOBODY = 65534


def make_ordinary(machine: Machine) -> None:
    """Have its daemon be an ordinary user's. Where these tests are not root's either, it is theirs."""
    if os.geteuid() != 0:
        return
    as_nobody = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    # Nobody may write anything; but root's Python and this checkout may be where only root can look.
    may_read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    machine.prefix = (str(shutil.which("setpriv")), *as_nobody, *may_read)


def start(machine: Machine) -> None:
    """Start it, with all that is there so far its own."""
    if os.geteuid() == 0:
        for path in (machine.root, *machine.root.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    machine.start()
