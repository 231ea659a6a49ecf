"""Everything at once, at random, for as long as you like: `LLMOS_CHAOS_S=600 make test-long ARGS='-k chaos'`."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from chaos import Chaos
from load import Traffic
from machine import Machine

#: Seconds of it.
DURATION_S = float(os.environ.get("LLMOS_CHAOS_S", "60"))
SEED = int(os.environ.get("LLMOS_CHAOS_SEED", "1"))


@pytest.mark.timeout(DURATION_S + 400)
def test_whatever_is_killed_frozen_flooded_and_changed_everything_comes_to_be_in_order(
    a_machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    print(f"LLMOS_CHAOS_SEED={SEED}")
    a_machine.configure('[logs]\nmax_size = "1M"\n', gateway=True)
    chaos = Chaos(a_machine, SEED)
    for text in chaos.files.values():
        a_machine.model(text)
    a_machine.start()
    for worker in ("sim@1", "calm@1", "gateway@1"):
        a_machine.wait_worker(worker, "ready")
    traffic = Traffic(a_machine, ["sim", "calm"])
    try:
        chaos.run(DURATION_S)
    finally:
        try:
            traffic.stop()
        finally:
            record_property("figures", f"chaos: {DURATION_S:.0f} s, {chaos.figures()}; {traffic.figures()}")
    chaos.check()
    assert traffic.compared
