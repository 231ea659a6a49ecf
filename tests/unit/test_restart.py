"""When a worker comes back: systemd's table row by row, the back-off, and the verdict on a life."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmosd.kernel.lifecycle import Trigger
from llmosd.kernel.restart import ExitStatus, backoff_s, spread, wants_restart
from llmosd.kernel.spec import Command, ModelSpec, Restart, Simulated
from llmosd.kernel.units import Seconds
from llmosd.kernel.verdict import Verdict, judge
from llmosd.kernel.worker import Worker

#: systemd.service(5), table 1, for the policies there are here.
SYSTEMD = {
    "no": set(),
    "always": {"clean", "code", "signal", "timeout"},
    "on-success": {"clean"},
    "on-failure": {"code", "signal", "timeout"},
    "on-abnormal": {"signal", "timeout"},
}
CAUSES: dict[str, list[tuple[ExitStatus | None, bool]]] = {
    "clean": [(ExitStatus(code=0), False), *((ExitStatus(signal=number), False) for number in (1, 2, 13, 15))],
    "code": [(ExitStatus(code=1), False), (ExitStatus(), False)],
    "signal": [(ExitStatus(signal=9), False), (ExitStatus(signal=11), False), (None, False)],
    "timeout": [(ExitStatus(code=0), True), (ExitStatus(signal=15), True), (ExitStatus(code=1), True)],
}


@pytest.mark.parametrize("policy", SYSTEMD)
@pytest.mark.parametrize("cause", CAUSES)
def test_each_policy_restarts_after_what_systemd_says(policy: str, cause: str) -> None:
    for status, timed_out in CAUSES[cause]:
        assert wants_restart(policy, status, timed_out) == (cause in SYSTEMD[policy]), (status, timed_out)


def test_an_exit_status_nobody_could_tell_is_no_success() -> None:
    assert not ExitStatus().clean
    assert str(ExitStatus()) == "exit status unknown"


@given(
    delay=st.floats(0, 1e4), delay_max=st.floats(0, 1e4), failures=st.integers(1, 10**9),
    jitter=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_a_back_off_lies_between_half_its_delay_and_its_maximum(
    delay: float, delay_max: float, failures: int, jitter: float
) -> None:
    restart = Restart(delay=Seconds(delay), delay_max=Seconds(delay_max))
    full = min(delay_max, delay * 2.0 ** min(failures - 1, 60))
    assert full / 2 <= backoff_s(restart, failures, jitter) <= full


def test_a_back_off_doubles_until_its_maximum() -> None:
    restart = Restart(delay=Seconds(0.2), delay_max=Seconds(1))
    assert [backoff_s(restart, failures, 0.0) for failures in range(1, 6)] == [0.1, 0.2, 0.4, 0.5, 0.5]


@given(st.integers(), st.text(), st.integers())
def test_the_spread_is_a_function_of_its_arguments(seed: int, name: str, count: int) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return  # lone surrogates: no worker has such a name
    assert 0 <= spread(seed, name, count) < 1
    assert spread(seed, name, count) == spread(seed, name, count)


def test_workers_that_fail_together_do_not_come_back_together() -> None:
    assert len({spread(1, f"m.{number}", 1) for number in range(100)}) == 100


def dead(
    status: ExitStatus | None, *, ready_at: float = 0.0, hosted: bool = True, restart: Restart | None = None
) -> Worker:
    """A worker of whose life nothing is left."""
    engine = Simulated() if hosted else Command(command=("true",))
    worker = Worker("m@1", "m", ModelSpec(model="m", engine=engine, restart=restart or Restart()))
    worker.exit_status, worker.ready_at, worker.starts = status, ready_at, [90.0]
    return worker


def test_who_was_stopped_stays_down_however_it_ended() -> None:
    worker = dead(ExitStatus(signal=11))
    worker.stop_wanted, worker.why = True, "stopped by an operator"
    assert judge(worker, 100.0, 1) == Verdict(Trigger.ENDED, "stopped by an operator")


def test_who_failed_comes_back_after_its_back_off() -> None:
    verdict = judge(dead(ExitStatus(signal=9), ready_at=95.0), 100.0, 1)
    assert (verdict.trigger, verdict.failures) == (Trigger.RETRY, 1)
    assert 100.1 <= verdict.restart_at <= 100.2


def test_what_can_never_work_is_given_up_at_once() -> None:
    worker = dead(None)
    worker.permanent, worker.failure_reason = True, "exec: no such file"
    assert judge(worker, 100.0, 1)[:2] == (Trigger.GAVE_UP, "exec: no such file")


def test_a_clean_exit_before_it_was_ready_is_a_failure() -> None:
    assert judge(dead(ExitStatus(code=0)), 100.0, 1)[:2] == (Trigger.RETRY, "exit code 0 before it was ready")
    assert judge(dead(ExitStatus(code=0), hosted=False), 100.0, 1).trigger is Trigger.ENDED


def test_a_clean_exit_of_who_was_ready_is_an_end_that_only_demand_undoes() -> None:
    verdict = judge(dead(ExitStatus(code=0), ready_at=95.0), 100.0, 1)
    assert (verdict.trigger, verdict.rested) == (Trigger.ENDED, True)


def test_a_policy_of_no_gives_up_after_a_failure() -> None:
    assert judge(dead(ExitStatus(code=1), restart=Restart(policy="no")), 100.0, 1).trigger is Trigger.GAVE_UP


def test_an_exit_code_after_which_trying_again_cannot_help_is_given_up_at_once() -> None:
    restart = Restart(policy="always", prevent_exit_codes=(2, 78))
    verdict = judge(dead(ExitStatus(code=78), restart=restart), 100.0, 1)
    assert verdict[:2] == (Trigger.GAVE_UP, "exit code 78; restart.prevent_exit_codes names it")
    assert judge(dead(ExitStatus(code=1), restart=restart), 100.0, 1).trigger is Trigger.RETRY


def test_a_burst_of_starts_is_given_up() -> None:
    worker = dead(ExitStatus(code=1), restart=Restart(burst=3, interval=Seconds(10)))
    worker.starts = [80.0, 92.0, 95.0]
    assert judge(worker, 100.0, 1).trigger is Trigger.RETRY
    worker.starts = [92.0, 95.0, 99.0]
    assert judge(worker, 100.0, 1)[:2] == (Trigger.GAVE_UP, "3 starts within 10s: exit code 1")


def test_who_ran_well_for_long_begins_with_the_first_delay_again() -> None:
    worker = dead(ExitStatus(code=1), ready_at=60.0)
    worker.failures = 9
    assert judge(worker, 100.0, 1).failures == 1
    worker.ready_at = 99.0
    assert judge(worker, 100.0, 1).failures == 10
