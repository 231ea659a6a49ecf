"""How workers are launched: what they are given, and what becomes of a launch that goes wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_models import SHORT, command, openai, simulated
from machine import Machine, machine, wait_for

from llmosd.launch.gate import ENVIRONMENT, Gate, Order, SetUpError, User
from llmosd.node.groups import MARK

#: Signals of the C library's own, which nobody can set.
THREAD_SIGNALS = 1 << 31 | 1 << 32


@pytest.fixture(scope="module")
def shared() -> Iterator[Machine]:
    with machine() as made:
        made.env["SECRET"] = "not for workers"
        made.env["LC_ALL"] = "C.UTF-8"
        made.model(command(["sleep", "1000"], name="plain", engine='env = { OWN = "yes", CUDA_VISIBLE_DEVICES = "0" }'))
        made.model(simulated("sim"))
        made.model(openai("stub", "openai_like.py", "--port", "{port}"))
        made.start()
        yield made


@pytest.fixture(scope="module", params=["plain", "sim", "stub", "stub's engine"])
def pid(shared: Machine, request: pytest.FixtureRequest) -> int:
    """Each process that a launch makes: a command, hosts, and an engine."""
    model, _, engine = str(request.param).partition("'")
    worker = shared.client.wait(shared.client.start(model).workers)[0]
    return worker.engine_pid if engine else worker.pid


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def test_a_worker_has_of_the_environment_what_is_allowed_its_mark_and_its_gpus(shared: Machine, pid: int) -> None:
    env = environment(pid)
    assert set(env) <= {*ENVIRONMENT, MARK, "CUDA_VISIBLE_DEVICES", "OWN", "PORT"}
    assert env["CUDA_VISIBLE_DEVICES"] == "" and env["LC_ALL"] == "C.UTF-8" and env[MARK]
    assert env.get("OWN", "") == ("yes" if pid == shared.worker("plain@1").pid else "")


def test_a_worker_has_no_descriptor_of_its_parents(shared: Machine, pid: int) -> None:
    """Hosts and engines open some themselves; none is a file, a socket or a pipe of the daemon's or the host's."""
    found = {int(path.name): str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert {0, 1, 2} <= set(found) and found[0] == "/dev/null"
    assert found[1] == found[2]
    if pid == shared.worker("plain@1").pid:
        assert set(found) == {0, 1, 2} and found[1].startswith("pipe:")
    assert shared.daemon is not None
    parents = {shared.daemon.pid, psutil.Process(pid).ppid()} - {pid}
    theirs = {str(path.readlink()) for parent in parents for path in Path(f"/proc/{parent}/fd").iterdir()}
    common = (set(found.values()) & theirs) - {"/dev/null", found[1]}
    assert {name for name in common if not name.startswith("anon_inode:")} == set()  # all of those have one name


def test_a_worker_starts_with_no_signal_blocked_or_ignored(shared: Machine, pid: int) -> None:
    found = status(pid)
    assert int(found["SigBlk"], 16) & ~THREAD_SIGNALS == 0
    # Python itself ignores SIGPIPE and SIGXFSZ as soon as it runs.
    is_python = pid != shared.worker("plain@1").pid
    pythons = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)
    assert int(found["SigIgn"], 16) & ~THREAD_SIGNALS & ~(pythons if is_python else 0) == 0


def test_a_worker_leads_a_session_of_its_own(shared: Machine, pid: int) -> None:
    assert os.getsid(pid) == pid and os.getpgid(pid) == pid
    assert int(status(pid)["NoNewPrivs"]) == 0


def test_an_engine_goes_before_its_host_when_memory_runs_out(shared: Machine) -> None:
    worker = shared.client.wait(shared.client.start("stub").workers)[0]

    def score(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert (score(worker.pid), score(worker.engine_pid)) == (own, own + 500)
    shared.client.set_limits("stub", {"oom_score_adj": str(own + 100)})
    wait_for("new scores", lambda: (score(worker.pid), score(worker.engine_pid)) == (own + 100, own + 600))


def test_limits_of_the_model_file_are_in_force_from_the_first_moment(shared: Machine) -> None:
    client = shared.client
    cpu = min(os.sched_getaffinity(0))
    limits = f'allowed_cpus = "{cpu}"\nnice = 5\nopen_files = 512\n'
    client.apply(openai("limited", "openai_like.py", "--port", "{port}", rest=limits + SHORT))
    worker = client.wait(client.start("limited").workers)[0]
    for pid in (worker.pid, worker.engine_pid):
        process = psutil.Process(pid)
        assert (os.sched_getaffinity(pid), process.nice(), process.rlimit(psutil.RLIMIT_NOFILE)) == (
            {cpu},
            5,
            (512, 512),
        )
    client.stop("limited")


# -- the gate itself --------------------------------------------------------------------------------------------

HOLDER = """
import asyncio, os, sys
from llmosd.launch.gate import Gate, Order
null = os.open(os.devnull, os.O_RDWR)
gate = Gate.spawn(stdin=null, stdout=1, stderr=2)
print(gate.pid, flush=True)
sys.stdin.read()
"""


def test_a_child_whose_parent_dies_before_go_runs_nothing_and_ends() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    assert psutil.Process(child).ppid() == holder.pid
    holder.kill()
    holder.wait()
    wait_for("end of the child", lambda: not _lives(child))
    assert holder.stdout.read() == ""


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("order", "step"),
    [
        pytest.param({"cwd": "/no/such/directory"}, "cwd", id="cwd"),
        pytest.param({"rlimits": {"NOFILE": (20, 10)}}, "rlimits", id="rlimits"),
        pytest.param({"cpu_affinity": (4000,)}, "cpu_affinity", id="cpu_affinity"),
        pytest.param({"oom_score_adj": 5000}, "oom_score_adj", id="oom_score_adj"),
        pytest.param({"argv": ("/no/such/program",)}, "exec", id="exec"),
        pytest.param({"argv": ("/etc/hostname",)}, "exec", id="not a program"),
        pytest.param({"env": {"A=B": "x"}}, "exec", id="environment"),
    ],
)
def test_a_step_of_the_set_up_that_fails_is_told_by_its_name(order: dict[str, object], step: str) -> None:
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    gate = Gate.spawn(stdin=null, stdout=null, stderr=null)
    os.close(null)
    whole = Order(**{"argv": ("true",), "env": dict(os.environ), **order})  # type: ignore[arg-type]
    with pytest.raises(SetUpError) as failed:
        asyncio.run(gate.go(whole))
    assert failed.value.step == step and str(failed.value)
    assert os.waitpid(gate.pid, 0)[1] != 0
    os.close(gate.pidfd)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process to another user")
def test_a_child_is_given_to_its_user_with_that_users_groups_and_nothing_else() -> None:
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    gate = Gate.spawn(stdin=null, stdout=write_end, stderr=null)
    os.close(null)
    os.close(write_end)
    user = User(uid=65534, gid=65534, groups=(65533,))
    asyncio.run(gate.go(Order(argv=("/bin/cat", "/proc/self/status"), env={}, user=user)))
    os.waitpid(gate.pid, 0)
    os.close(gate.pidfd)
    with os.fdopen(read_end) as told:
        found = {line.partition(":")[0]: line.split()[1:] for line in told}
    assert (found["Uid"], found["Gid"], found["Groups"]) == (["65534"] * 4, ["65534"] * 4, ["65533"])
    assert found["CapEff"] == ["0000000000000000"]


def test_failed_launches_leave_no_descriptor_no_process_and_no_group(shared: Machine) -> None:
    client = shared.client
    client.apply(command(["/no/such/program"], name="never"))
    client.start("never")
    shared.wait_worker("never@1", "failed")
    assert shared.daemon is not None
    daemon = psutil.Process(shared.daemon.pid)

    def fail() -> int:
        client.start("never")
        shared.wait_worker("never@1", "failed")
        return daemon.num_fds()

    counts = [fail() for _ in range(6)]
    assert counts[-1] <= counts[0] + 2, counts  # clients of this test come and go
    group = Path(f"/proc/{client.worker('sim@1').pid or daemon.pid}/cgroup").read_text().rpartition("0::")[2].strip()
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    tree = next((Path(words[4]) for words in mounts if words[words.index("-") + 1] == "cgroup2"), Path("/nonexistent"))
    assert not list((tree / group.lstrip("/")).parent.glob("never*"))
    shared.check_processes()
