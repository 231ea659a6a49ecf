"""The table of worker states: total where it must be, and nothing dead but by a verdict."""

from __future__ import annotations

import pytest

from llmosd.kernel.lifecycle import ALIVE, COMING, TABLE, Action, State, Trigger, step

S, T, A = State, Trigger, Action
VERDICTS = {T.ENDED, T.RETRY, T.GAVE_UP}
DEAD = frozenset(State) - ALIVE
CELLS = [(state, trigger, *cell) for state, row in TABLE.items() for trigger, cell in row.items()]


def test_every_state_has_a_row() -> None:
    assert set(TABLE) == set(State)


def test_every_trigger_and_every_action_is_used() -> None:
    assert {trigger for _, trigger, _, _ in CELLS} == set(Trigger)
    assert {action for *_, actions in CELLS for action in actions} == set(Action)


@pytest.mark.parametrize("state", sorted(ALIVE))
@pytest.mark.parametrize("trigger", [T.EXITED, T.STOP, T.DRAIN])
def test_whatever_lives_can_exit_and_can_be_stopped(state: State, trigger: Trigger) -> None:
    found = step(state, trigger)
    assert found is not None
    assert found[0] in {S.STOPPING, S.DRAINING, S.UNKILLABLE}


def test_only_a_verdict_leads_from_life_to_death() -> None:
    for state, trigger, target, _ in CELLS:
        if state in ALIVE and target in DEAD:
            assert trigger in VERDICTS, f"{trigger} in {state}"


def test_a_verdict_is_given_only_where_no_process_is_left_to_be_killed() -> None:
    for state, trigger, target, actions in CELLS:
        if trigger in VERDICTS:
            assert state in {S.STARTING, S.STOPPING, S.UNKILLABLE}
            assert target in DEAD
            assert A.KILL not in actions


def test_resources_are_released_by_verdicts_alone_and_by_each_of_them() -> None:
    for _, trigger, _, actions in CELLS:
        assert (A.RELEASE in actions) == (trigger in VERDICTS)


def test_requests_are_given_away_only_once_nothing_of_the_worker_can_run() -> None:
    for state, trigger, _, actions in CELLS:
        if A.LOSE_REQUESTS in actions:
            assert trigger in VERDICTS or (state, trigger) == (S.STOPPING, T.HUNG)


def test_an_exit_kills_what_is_left_of_the_group() -> None:
    for state, trigger, target, actions in CELLS:
        if trigger is T.EXITED and state is not S.UNKILLABLE:
            assert (target, actions) == (S.STOPPING, (A.KILL,))


def test_a_process_is_spawned_only_where_none_exists() -> None:
    for state, trigger, target, actions in CELLS:
        assert (A.SPAWN in actions) == (trigger is T.START)
        if trigger is T.START:
            assert state in DEAD
            assert target is S.STARTING


def test_a_frozen_process_is_thawed_before_it_is_told_anything() -> None:
    for state, trigger, _, actions in CELLS:
        if state is S.FROZEN and {A.TERM, A.TELL_DRAIN} & set(actions):
            assert actions[0] is A.THAW, trigger


def test_every_state_but_the_patient_ones_can_time_out_or_be_restarted() -> None:
    for state in ALIVE - {S.READY, S.ASLEEP, S.FROZEN}:
        assert step(state, T.TIMEOUT) is not None, state
    assert step(S.BACKOFF, T.START) is not None


def test_whatever_is_down_can_be_started_and_every_failure_can_be_reset() -> None:
    for state in DEAD:
        assert step(state, T.START) is not None
        assert step(state, T.RESET) == (S.STOPPED, ())


def test_whatever_is_coming_becomes_ready_by_what_the_worker_says() -> None:
    for state in COMING & ALIVE:
        found = step(state, T.LOADED)
        assert found is not None
        assert found == (S.READY, (A.DISPATCH,))


def test_every_state_can_be_reached() -> None:
    reached, before = {S.STOPPED}, set[State]()
    while reached != before:
        before = set(reached)
        reached |= {target for state, _, target, _ in CELLS if state in before}
    assert reached == set(State)


def test_a_pair_that_is_not_in_the_table_means_nothing() -> None:
    assert step(S.STOPPED, T.EXITED) is None
