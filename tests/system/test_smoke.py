"""The thin path through everything, on a simulated engine."""

from __future__ import annotations

from machine import SIMULATED, Machine


def test_a_request_starts_its_model_and_is_answered(a_machine: Machine) -> None:
    a_machine.model(SIMULATED)
    a_machine.start()
    answer = a_machine.client.run("sim", "one two three", max_tokens=5)
    assert len(answer.text.split()) == 5
    assert a_machine.worker("sim@1").state == "ready"
