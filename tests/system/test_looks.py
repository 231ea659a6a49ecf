"""What `llmos ps` shows of workers that sleep, wake up and sleep again: the truth within a few seconds."""

from __future__ import annotations

import os

from engine_models import command
from machine import Machine, wait_for


def test_a_worker_that_wakes_up_is_seen_to_and_again_when_it_sleeps(a_machine: Machine) -> None:
    fifo = a_machine.root / "wake"
    os.mkfifo(fifo)
    asleep = ["/bin/sh", "-c", f"read line < {fifo}; while :; do :; done"]
    a_machine.model(command(asleep, name="sleeper"))
    a_machine.start()
    a_machine.client.start("sleeper")
    a_machine.wait_worker("sleeper@1", "ready")
    wait_for("measured worker", lambda: a_machine.worker("sleeper@1").memory_bytes > 0)
    assert a_machine.worker("sleeper@1").cpu_percent < 50
    fifo.write_text("up\n")
    wait_for("busy worker", lambda: a_machine.worker("sleeper@1").cpu_percent > 5)
    a_machine.client.kill("sleeper@1", "STOP")
    wait_for("worker at rest", lambda: a_machine.worker("sleeper@1").cpu_percent == 0)
