"""Whether a worker that ended comes back, and when. Pure; for the kernel."""

from __future__ import annotations

import hashlib

import msgspec

from llmosd.kernel.spec import Restart


class ExitStatus(msgspec.Struct, frozen=True):
    """How a process ended. Neither code nor signal: nobody could tell, which is not success."""

    code: int | None = None
    signal: int | None = None

    @property
    def clean(self) -> bool:
        """systemd's notion of a clean exit: code 0, or one of the signals that ask to end."""
        return self.code == 0 or self.signal in (1, 2, 13, 15)

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by signal {self.signal}"
        return "exit status unknown" if self.code is None else f"exit code {self.code}"


def wants_restart(policy: str, status: ExitStatus | None, timed_out: bool) -> bool:
    """systemd's table (systemd.service(5), Restart=). `status` None: it could not be started at all.

    `timed_out`: llmosd ended it because it hung, or did not start or stop in time.
    """
    if policy in ("no", "always"):
        return policy == "always"
    abnormal = timed_out or status is None or (status.signal is not None and not status.clean)
    if policy == "on-abnormal":
        return abnormal
    clean = status is not None and status.clean and not timed_out
    return clean if policy == "on-success" else not clean


def backoff_s(restart: Restart, failures: int, jitter: float) -> float:
    """Seconds before restart number `failures` (from 1) in a row.

    Exponential back-off with equal jitter (M. Brooker, "Exponential Backoff And Jitter", AWS 2015): half of the
    delay is fixed, half is spread by `jitter` in [0, 1).
    """
    delay = min(float(restart.delay_max), float(restart.delay) * 2.0 ** min(failures - 1, 60))
    return delay / 2 + delay / 2 * jitter


def spread(seed: int, name: str, count: int) -> float:
    """A number in [0, 1) that looks random and is a function of its arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{name}/{count}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
