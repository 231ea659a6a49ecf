"""Random trouble for a real daemon with real workers, and what must hold in the middle of it.

What is done is a function of the seed, when it happens is the machine's: a seed brings the same trouble again, not the
same moment. Every few seconds the trouble pauses, and everything must come to be in order within a deadline.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import psutil
from engine_models import command, openai, simulated
from machine import Machine, wait_for

import llmos
from llmos.errors import DaemonUnreachable, LlmosError
from llmos.types import Worker

#: Seconds between two pauses, and in which everything must be in order then.
PAUSE_EVERY_S = 5.0
IN_ORDER_WITHIN_S = 40.0
#: Seconds in which a daemon that is up answers.
ANSWERS_WITHIN_S = 5.0
#: What the daemon may grow to, whatever happens.
RSS_MAX = 300 << 20
FDS_MAX = 1000
DOWN = ("stopped", "backoff", "failed")

SOON = """
[restart]
policy = "{policy}"
delay = "100ms"
delay_max = "1s"
burst = {burst}
prevent_exit_codes = [78]
[timeouts]
drain = "1s"
stop = "1s"
silence = "3s"
[resources]
cpus = 0.05
memory = "16M"
"""
ALWAYS = SOON.format(policy="always", burst=0)
ON_FAILURE = SOON.format(policy="on-failure", burst=5)
BOMB = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(50):
    if os.fork() == 0:
        os.setsid()
        break
while True:
    time.sleep(1000)
"""
FORKER = """
import os, time
while True:
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            time.sleep(0.2)
        os._exit(0)
    os.wait()
    time.sleep(0.1)
"""
FLOOD = "import os, time\nfor _ in range(64): os.write(1, b'flood ' * 50_000); time.sleep(0.01)\ntime.sleep(1000)"


def models() -> dict[str, str]:
    """The model files: two that are under load, and all kinds of trouble."""
    python = sys.executable
    return {
        "sim": simulated("sim", decode_rate=100, rest=ALWAYS + "[scale]\nmin = 1\nmax = 2\n"),
        "calm": simulated("calm", decode_rate=100, rest=ALWAYS + "[scale]\nmin = 1\n"),
        "engine": openai("engine", rest=ALWAYS),
        "stubborn": openai("stubborn", "stubborn.py", "{port}", rest=ALWAYS),
        "forker": command([python, "-c", FORKER], name="forker", rest=ALWAYS),
        "bomb": command([python, "-c", BOMB], name="bomb", rest=ALWAYS),
        "flood": command([python, "-c", FLOOD], name="flood", rest=ON_FAILURE),
        "crash": command(["sh", "-c", "exit 3"], name="crash", rest=ON_FAILURE),
        "done": command(["sh", "-c", "exit 0"], name="done", rest=ON_FAILURE),
        "hopeless": command(["sh", "-c", "exit 78"], name="hopeless", rest=ON_FAILURE),
    }


class Chaos:
    """See the module."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine = machine
        self.chance = random.Random(seed)
        self.seed = seed
        self.done: Counter[str] = Counter()
        self.refused = 0
        self.deaths = 0
        self.rss: list[int] = []
        self.fds: list[int] = []
        self.slowest_s = 0.0
        self.files = models()
        #: What is done, and how often in relation to the others.
        self._operations: dict[Callable[[], None], int] = {
            self.kill_worker: 8, self.kill_engine: 4, self.kill_gateway: 2, self.kill_daemon: 3, self.stall: 3,
            self.freeze: 4, self.thaw: 5, self.set_limits: 5, self.reload: 4, self.reload_bad: 3, self.start: 10,
            self.stop: 5, self.restart: 5, self.reset: 3, self.kill_by_command: 4, self.vanish: 3,
        }  # fmt: skip

    def run(self, duration_s: float) -> None:
        end = time.monotonic() + duration_s
        pause = time.monotonic() + PAUSE_EVERY_S
        for name in self.files:
            self._tolerant(lambda client, name=name: client.start(name))  # type: ignore[misc]
        while time.monotonic() < end:
            (operation,) = self.chance.choices([*self._operations], [*self._operations.values()])
            self.done[operation.__name__] += 1
            operation()
            time.sleep(self.chance.expovariate(10))  # not to wait for something: trouble comes as it likes
            if time.monotonic() > pause:
                self.check()
                pause = time.monotonic() + PAUSE_EVERY_S
        self.check()

    # -- trouble --------------------------------------------------------------------------------------------

    def _tolerant(self, call: Callable[[llmos.Client], object]) -> None:
        """Ask the daemon for something. It may refuse; not to answer is a fault."""
        try:
            call(self.machine.watcher)
        except DaemonUnreachable:
            raise
        except LlmosError:
            self.refused += 1

    def _workers(self) -> list[Worker]:
        return [worker for worker in self.machine.watcher.ps() if worker.pid]

    def _model(self) -> str:
        return self.chance.choice(sorted(self.files))

    def _signal(self, pid: int, number: int) -> None:
        """To one of the workers' processes; by the time it is sent, the number may be nobody's."""
        if pid in self.machine.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_worker(self) -> None:
        if workers := self._workers():
            self._signal(self.chance.choice(workers).pid, signal.SIGKILL)

    def kill_engine(self) -> None:
        if engines := [worker.engine_pid for worker in self._workers() if worker.engine_pid]:
            self._signal(self.chance.choice(engines), signal.SIGKILL)

    def kill_gateway(self) -> None:
        for worker in self._workers():
            if worker.model == "gateway":
                self._signal(worker.pid, signal.SIGKILL)

    def kill_by_command(self) -> None:
        name = self._model()
        self._tolerant(lambda client: client.kill(name, signal.SIGKILL))

    def kill_daemon(self) -> None:
        """Often again before the next one is up, and with a worker that dies in between."""
        victims = self._workers()
        self._look_at_daemon()
        self.machine.kill()
        self.deaths += 1
        if victims and self.chance.random() < 0.5:
            self._signal(self.chance.choice(victims).pid, signal.SIGKILL)
        while self.chance.random() < 0.3:
            self.machine.start(expect_failure=True)
            time.sleep(self.chance.uniform(0, 0.8))
            self.machine.kill()
            self.deaths += 1
        self.machine.start()

    def stall(self) -> None:
        """SIGSTOP behind the daemon's back."""
        if workers := self._workers():
            pid = self.chance.choice(workers).pid
            self._signal(pid, signal.SIGSTOP)
            time.sleep(self.chance.uniform(0.1, 0.5))
            self._signal(pid, signal.SIGCONT)

    def freeze(self) -> None:
        name = self._model()
        self._tolerant(lambda client: client.kill(name, signal.SIGSTOP))

    def thaw(self) -> None:
        for worker in self.machine.watcher.ps():
            if worker.state == "frozen":
                name = worker.name
                self._tolerant(lambda client, name=name: client.kill(name, signal.SIGCONT))  # type: ignore[misc]

    def set_limits(self) -> None:
        limits = [
            {"nice": str(self.chance.randrange(10))}, {"slots": str(self.chance.randrange(1, 9))},
            {"oom_score_adj": str(self.chance.randrange(500))}, {"memory_max": f"{self.chance.randrange(1, 9)}G"},
            {"memory_max": ""}, {"allowed_cpus": "0"}, {"allowed_cpus": ""}, {"cpu_quota": "17%"}, {"nice": "100"},
        ]  # fmt: skip
        name, changes = self._model(), self.chance.choice(limits)
        self._tolerant(lambda client: client.set_limits(name, changes))

    def reload(self) -> None:
        """Other files that are right: changed, gone, and there again."""
        name = self._model()
        rate = self.chance.randrange(50, 200)
        text = re.sub(r"decode_rate = \d+", f"decode_rate = {rate}", self.files[name])
        if name not in ("sim", "calm") and self.chance.random() < 0.3:
            (self.machine.models / f"{name}.toml").unlink(missing_ok=True)
        else:
            self.machine.model(text)
        self._tolerant(lambda client: client.reload())

    def reload_bad(self) -> None:
        name = self._model()
        bad = self.chance.choice(
            ["model = ", 'model = "other"\n', self.files[name] + "\n[nonsense]\nx = 1\n", "\0\xff"]
        )
        self.machine.model(bad, name)
        self._tolerant(lambda client: client.reload())
        self.machine.model(self.files[name], name)

    def start(self) -> None:
        name = self._model()
        self._tolerant(lambda client: client.start(name))

    def stop(self) -> None:
        name, now = self._model(), self.chance.random() < 0.5
        self._tolerant(lambda client: client.stop(name, now=now))
        if name in ("sim", "calm"):
            self._tolerant(lambda client: client.start(name))

    def restart(self) -> None:
        name = self._model()
        self._tolerant(lambda client: client.restart(name))

    def reset(self) -> None:
        name = self._model()
        self._tolerant(lambda client: client.reset(name))

    def vanish(self) -> None:
        """A client that is killed in the middle of its stream."""
        code = "import llmos, sys\nfor piece in llmos.Client(sys.argv[1]).run('calm', 'gone', stream=True, max_tokens=500): print(1, flush=True)"  # fmt: skip # noqa: E501
        client = subprocess.Popen(
            [sys.executable, "-c", code, str(self.machine.runtime)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert client.stdout is not None
        select.select([client.stdout], [], [], 1.0)  # its worker may be frozen
        client.kill()
        client.communicate()

    # -- what must hold -------------------------------------------------------------------------------------

    def check(self) -> None:
        """A pause: the daemon answers in time, and all is in order."""
        self.thaw()
        began = time.monotonic()
        with llmos.Client(str(self.machine.runtime), patience=ANSWERS_WITHIN_S) as client:
            status = client.status()
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        assert self.slowest_s < ANSWERS_WITHIN_S
        assert status.counters["faults"] == 0, self.machine.log()
        assert "Traceback" not in self.machine.log(), self.machine.log()
        self._look_at_daemon()
        found: list[str] = []

        def in_order() -> bool:
            found[:] = self.disorder()
            return not found

        try:
            wait_for("order", in_order, IN_ORDER_WITHIN_S)
        except AssertionError as late:
            raise AssertionError(f"{late}:\n" + "\n".join(found)) from None
        assert self.machine.zombies() == [] or wait_for("reaped children", lambda: not self.machine.zombies())

    def disorder(self) -> list[str]:
        """What is not as it must be when all have had their time."""
        before = {worker.name: worker for worker in self._all()}
        held = self.groups()
        after = {worker.name: worker for worker in self._all()}
        found = []
        for name, groups in held.items():
            if len(groups) > 1:
                self.check_one_life(name, groups)
            if not any(name in all_of and all_of[name].state not in DOWN for all_of in (before, after)):
                found.append(f"{name} is not up, and has processes: {groups}")
        alive = [worker for worker in after.values() if worker.state not in DOWN]
        devices = {device.id: device.reserved for device in self.machine.watcher.devices().devices}
        if abs(devices["cpus"] - sum(worker.cpus for worker in alive)) > 1e-6:
            found.append(f"{devices['cpus']} CPUs are reserved for {[(w.name, w.cpus) for w in alive]}")
        found += [f"{w.name} holds {w.cpus} CPUs while {w.state}" for w in after.values() if w.cpus and w.state in DOWN]
        found += [f"{w.name} is {w.state}: {w.why}" for w in alive if w.state in ("stopping", "unkillable", "adopted")]
        found += [f"{w.name} has no process" for w in alive if w.state in ("loading", "ready") and w.name not in held]
        return found

    def _all(self) -> tuple[Worker, ...]:
        return self.machine.watcher.ps(include_stopped=True)

    def groups(self) -> dict[str, dict[str, list[int]]]:
        """The workers' processes: by worker, and by the group, which is one life of it."""
        found: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        name = re.escape(self.machine.group)
        for pid in self.machine.processes():
            with contextlib.suppress(OSError):
                cgroup, environ = Path(f"/proc/{pid}/cgroup").read_text(), Path(f"/proc/{pid}/environ").read_bytes()
                match = re.search(rf"{name}/([^/\n\0]+)-(\d+)", cgroup) or re.search(
                    rf"LLMOSD_GROUP={name}/([^/\n\0]+)-(\d+)", environ.decode(errors="replace")
                )
                if match is not None:
                    found[match[1]][match[2]].append(pid)
        return {worker: dict(groups) for worker, groups in found.items()}

    def check_one_life(self, worker: str, groups: dict[str, list[int]]) -> None:
        """Processes come and go while they are listed: two lives at once are those of which somebody lives still."""
        lives = {life: [pid for pid in pids if _lives(pid)] for life, pids in groups.items()}
        assert sum(map(bool, lives.values())) <= 1, f"{worker} is there twice: {lives}"

    def _look_at_daemon(self) -> None:
        assert self.machine.daemon is not None
        daemon = psutil.Process(self.machine.daemon.pid)
        self.rss.append(daemon.memory_info().rss)
        self.fds.append(daemon.num_fds())
        assert self.rss[-1] < RSS_MAX and self.fds[-1] < FDS_MAX

    def figures(self) -> str:
        mib, fds = [rss >> 20 for rss in self.rss] or [0], self.fds or [0]
        return (
            f"{sum(self.done.values())} operations ("
            + ", ".join(f"{name} {count}" for name, count in sorted(self.done.items()))
            + f"; {self.refused} calls refused), {self.deaths} deaths of the daemon, its slowest answer "
            f"{self.slowest_s:.2f} s, RSS {mib[0]}, {mib[-1]} and at most {max(mib)} MiB, descriptors {fds[0]}, "
            f"{fds[-1]} and at most {max(fds)}; seed {self.seed}"
        )


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
