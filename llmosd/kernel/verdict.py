"""What comes after a life of a worker: it stays down, comes back after a delay, or has failed. Pure; for the kernel."""

from __future__ import annotations

from typing import NamedTuple

from llmosd.kernel.lifecycle import Trigger
from llmosd.kernel.restart import backoff_s, spread, wants_restart
from llmosd.kernel.worker import Worker


class Verdict(NamedTuple):
    """One of the verdict triggers of `lifecycle`, and what goes with it."""

    trigger: Trigger
    why: str
    #: Failures in a row, this one included.
    failures: int = 0
    #: Only demand or an operator starts it again.
    rested: bool = False
    restart_at: float = 0.0


def judge(worker: Worker, now: float, seed: int) -> Verdict:
    """What a worker's end, of which nothing is left, amounts to."""
    if worker.stop_wanted:
        return Verdict(Trigger.ENDED, worker.why)
    restart, status = worker.spec.restart, worker.exit_status
    cause = worker.failure_reason or (str(status) if status else "never ran")
    if worker.permanent:
        return Verdict(Trigger.GAVE_UP, cause, worker.failures)
    if status is not None and status.code in restart.prevent_exit_codes:
        return Verdict(Trigger.GAVE_UP, f"{cause}; restart.prevent_exit_codes names it", worker.failures)
    # As for a unit of Type=notify, an end before READY=1 is a failure whatever the exit code (systemd: "protocol").
    early = worker.spec.says_ready and not worker.ready_at and status is not None and status.clean
    if early and not worker.failure_reason:
        cause = f"{status} before it was ready"
    faulted = worker.faulted or early
    if not wants_restart(restart.policy, status, faulted):
        clean = status is not None and status.clean and not faulted
        return Verdict(Trigger.ENDED if clean else Trigger.GAVE_UP, cause, worker.failures, rested=True)
    rested_well = worker.ready_at and now - worker.ready_at >= restart.reset_after
    failures = 1 if rested_well else worker.failures + 1
    recent = sum(at > now - restart.interval for at in worker.starts)
    if restart.burst and recent >= restart.burst:
        return Verdict(Trigger.GAVE_UP, f"{recent} starts within {restart.interval}: {cause}", failures)
    delay_s = backoff_s(restart, failures, spread(seed, worker.name, worker.restarts + failures))
    return Verdict(Trigger.RETRY, cause, failures, restart_at=now + delay_s)
