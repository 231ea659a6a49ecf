"""The kernel and both ends of the bus under faults, in virtual time, with every invariant checked at every step.

A seed that fails is replayed alone, exactly, with LLMOS_SIM_SEED=<seed>; LLMOS_SIM_STEPS sets how long each runs, and
LLMOS_SIM_SEEDS how many there are.
"""

from __future__ import annotations

import os

import pytest

from tests.simulation.world import World

STEPS = int(os.environ.get("LLMOS_SIM_STEPS", "12500"))
COUNT = int(os.environ.get("LLMOS_SIM_SEEDS", "8"))
SEEDS = [int(os.environ["LLMOS_SIM_SEED"])] if "LLMOS_SIM_SEED" in os.environ else list(range(1, COUNT + 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_request_ends_once_whatever_fails(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(seed)
    started = world.clock.now
    try:
        world.run(STEPS)
        trouble = world.clock.now - started
        world.settle()
    except Exception as error:
        error.add_note(f"step {world.steps}; replay: LLMOS_SIM_SEED={seed} LLMOS_SIM_STEPS={STEPS} pytest {__file__}")
        raise
    with capsys.disabled():
        ends = ", ".join(f"{count} {how}" for how, count in sorted(world.ends.items()))
        print(
            f"\nseed {seed}: {world.steps} kernel steps, {trouble:.0f} s of trouble, {world.life} lives of the daemon, "
            f"{world.submitted} requests: {ends}"
        )
