"""The `process` maker on real process trees: what the kernel says of each thread afterwards is what counts."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llmosd.kernel.spec import Limits
from llmosd.kernel.units import Bytes, CpuSet
from llmosd.node.confine import Confinement, LaunchSettings, Unenforceable
from llmosd.node.confine.live import Step, autogroups_count, change_tree, oom_score_adj, with_descendants
from llmosd.node.confine.process import (
    CAP_SYS_NICE,
    CAP_SYS_RESOURCE,
    ProcessConfinement,
    disks_that_weigh,
    has_capability,
    ionice_of,
)
from llmosd.node.usage import Usage, sample

Start = Callable[..., "subprocess.Popen[str]"]

#: A host with two threads more, whose child, with as many, is in a session of its own, as an engine is. The child's
#: oom_score_adj is 500 above the host's.
TREE = """
import os, sys, threading
def threads():
    for _ in range(2): threading.Thread(target=threading.Event().wait, daemon=True).start()
with open('/proc/self/oom_score_adj', 'w') as file: file.write('100')
out, into = os.pipe()
if os.fork() == 0:
    os.setsid()
    with open('/proc/self/oom_score_adj', 'w') as file: file.write('600')
    threads(); os.write(into, b'x'); threading.Event().wait()
threads(); os.read(out, 1); print('ready', flush=True); sys.stdin.read()
"""


@pytest.fixture
def tree(start: Start) -> list[int]:
    """The process ids of TREE: host, engine."""
    process = start(TREE)
    assert said(process) == "ready"
    pids = with_descendants([process.pid])
    assert len(pids) == 2
    return pids


def said(process: subprocess.Popen[str]) -> str:
    """The next line the program prints: it blocks until there is one, and pytest's timeout bounds it."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def threads_of(pids: list[int]) -> list[int]:
    return [int(path.name) for pid in pids for path in Path(f"/proc/{pid}/task").iterdir()]


def allowed(tid: int) -> str:
    return Path(f"/proc/{tid}/status").read_text().split("Cpus_allowed_list:")[1].split()[0]


def refusal(limits: Limits, confinement: Confinement | None = None) -> Unenforceable:
    with pytest.raises(Unenforceable) as caught:
        (confinement or ProcessConfinement()).check(limits)
    return caught.value


# -- live changes -------------------------------------------------------------------------------------------------


def test_affinity_changes_on_every_thread_of_every_process(tree: list[int]) -> None:
    last = max(os.sched_getaffinity(0))
    assert ProcessConfinement().apply(tree[:1], Limits(allowed_cpus=CpuSet([last]))) == []
    assert len(threads_of(tree)) == 6
    assert {allowed(tid) for tid in threads_of(tree)} == {str(last)}


def test_nice_changes_on_every_thread_and_on_the_sessions_of_the_worker(tree: list[int]) -> None:
    ours = Path("/proc/self/autogroup").read_text() if autogroups_count() else ""
    assert ProcessConfinement().apply(tree, Limits(nice=7)) == []
    assert {os.getpriority(os.PRIO_PROCESS, tid) for tid in threads_of(tree)} == {7}
    if autogroups_count():
        assert {Path(f"/proc/{pid}/autogroup").read_text().split()[-1] for pid in tree} == {"7"}
        assert Path("/proc/self/autogroup").read_text() == ours


def test_io_weight_becomes_a_level_of_every_thread(tree: list[int]) -> None:
    assert ProcessConfinement(io_weighed=True).apply(tree, Limits(io_weight=50)) == []
    levels = {(int(io.ioclass), io.value) for io in (psutil.Process(tid).ionice() for tid in threads_of(tree))}
    assert levels == {(2, 6)}


def test_open_files_are_bounded_in_every_process(tree: list[int]) -> None:
    assert ProcessConfinement().apply(tree, Limits(open_files=99)) == []
    assert {resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in tree} == {(99, 99)}


def test_an_engine_stays_500_above_its_host_for_the_oom_killer(tree: list[int]) -> None:
    confinement = ProcessConfinement()
    first, second = Limits(oom_score_adj=300), Limits(oom_score_adj=900)
    assert confinement.apply(tree, first) == []
    assert [oom_score_adj(pid) for pid in tree] == [300, 800]
    assert confinement.apply(tree, second, before=first) == []
    assert [oom_score_adj(pid) for pid in tree] == [900, 1000]


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_threads_and_processes_that_appear_meanwhile_are_reached_too(start: Start, kind: str) -> None:
    process = start(
        "import os, sys, threading\n"
        "def wait(): print(threading.get_native_id(), flush=True); threading.Event().wait()\n"
        "print('ready', flush=True)\n"
        "if sys.stdin.readline() == 'thread\\n': threading.Thread(target=wait, daemon=True).start()\n"
        "elif os.fork() == 0: wait()\n"
        "sys.stdin.read()"
    )
    assert said(process) == "ready"
    met: list[int] = []
    born: list[int] = []

    def change(tid: int) -> None:
        met.append(tid)
        if len(met) == 1:
            assert process.stdin is not None
            process.stdin.write(kind + "\n")
            process.stdin.flush()
            born.append(int(said(process)))

    assert change_tree([process.pid], [Step("nice", change, on_threads=True, advice="")]) == []
    assert met == [process.pid, *born]


def test_a_tree_that_never_stops_growing_is_told_of(start: Start) -> None:
    process = start(
        "import sys, threading\n"
        "for _ in sys.stdin:\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start(); print('one more', flush=True)"
    )

    def change(tid: int) -> None:
        assert process.stdin is not None
        process.stdin.write("more\n")
        process.stdin.flush()
        said(process)

    (failure,) = change_tree([process.pid], [Step("nice", change, on_threads=True, advice="")])
    assert failure.startswith(f"processes or threads kept appearing under {process.pid}")


def test_what_an_engine_arranged_for_itself_stays_when_another_limit_changes(start: Start) -> None:
    last = max(os.sched_getaffinity(0))
    process = start(
        f"import os, sys; os.sched_setaffinity(0, {{{last}}}); print('ready', flush=True); sys.stdin.read()"
    )
    assert said(process) == "ready"
    before = Limits(allowed_cpus=CpuSet(os.sched_getaffinity(0)))
    after = Limits(allowed_cpus=before.allowed_cpus, nice=3)
    assert ProcessConfinement().apply([process.pid], after, before) == []
    assert allowed(process.pid) == str(last)
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == 3


def test_a_limit_that_is_lifted_goes_back_to_the_daemons_own(tree: list[int]) -> None:
    confinement = ProcessConfinement()
    narrow = Limits(allowed_cpus=CpuSet([max(os.sched_getaffinity(0))]))
    assert confinement.apply(tree, narrow) == []
    assert confinement.apply(tree, Limits(), before=narrow) == []
    assert {allowed(tid) for tid in threads_of(tree)} == {allowed(os.getpid())}


def test_a_process_that_is_gone_is_no_failure(start: Start) -> None:
    process = start("pass")
    process.wait(timeout=30)
    limits = Limits(allowed_cpus=CpuSet(os.sched_getaffinity(0)), nice=5, open_files=50, oom_score_adj=500)
    assert ProcessConfinement().apply([process.pid], limits) == []
    assert ProcessConfinement().apply([], limits) == []


def test_what_an_ordinary_user_may_not_do_is_told_and_not_passed_over() -> None:
    # In a process without privileges, whoever runs the tests. Its child lives as long as it does.
    code = """
import os
from llmosd.kernel.spec import Limits
from llmosd.node.confine import Unenforceable
from llmosd.node.confine.process import ProcessConfinement
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
ready, tell = os.pipe()
lasts, _held = os.pipe()
child = os.fork()
if child == 0:
    os.close(_held); os.setpriority(os.PRIO_PROCESS, 0, 10); os.write(tell, b'x'); os.read(lasts, 1); os._exit(0)
os.read(ready, 1)
print(*ProcessConfinement().apply([child], Limits(nice=2)), sep='|')
try: ProcessConfinement().check(Limits(nice=-5))
except Unenforceable as refused: print(refused)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    failure, refused = ran.stdout.splitlines()
    assert failure.startswith("nice could not be changed on ")
    assert failure.endswith(": lowering it needs CAP_SYS_NICE; restart the worker")
    assert refused.startswith("nice of -5 needs CAP_SYS_NICE; llmosd may set ")


def test_raising_open_files_of_a_worker_that_runs_is_done_or_told(tree: list[int]) -> None:
    confinement = ProcessConfinement()
    confinement.apply(tree, Limits(open_files=50))
    failures = confinement.apply(tree, Limits(open_files=60), before=Limits(open_files=50))
    if has_capability(CAP_SYS_RESOURCE):
        assert failures == []
    else:
        assert len(failures) == 1
        assert "restart the worker" in failures[0]


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [
        Limits(cpu_weight=50),
        Limits(cpu_quota="50%"),  # type: ignore[arg-type]  # any value will do
        Limits(memory_high=Bytes(1)),
        Limits(swap_max=Bytes(0)),
        Limits(gpu_memory_max=Bytes(1)),
    ],
)
def test_a_limit_that_only_a_cgroup_can_hold_is_refused_by_name(limits: Limits) -> None:
    (name,) = (name for name in limits.__struct_fields__ if getattr(limits, name) != getattr(Limits(), name))
    assert refusal(limits).limit == name
    assert ProcessConfinement().enforcement(name) == ""


def test_cpus_that_are_not_there_are_refused_and_those_there_are_named() -> None:
    refused = refusal(Limits(allowed_cpus=CpuSet([0, 6, 7])), ProcessConfinement(CpuSet(range(4))))
    assert str(refused) == "allowed_cpus names CPUs 6-7; llmosd may use 0-3"


def test_io_weight_is_refused_unless_a_disk_heeds_it() -> None:
    assert refusal(Limits(io_weight=50), ProcessConfinement(io_weighed=False)).limit == "io_weight"
    ProcessConfinement(io_weighed=True).check(Limits(io_weight=50))


def test_only_disks_that_bfq_schedules_heed_io_weight(tmp_path: Path) -> None:
    for disk, scheduler in {"sda": "none [bfq]", "sdb": "[mq-deadline] bfq", "loop0": "[bfq] none"}.items():
        queue = tmp_path / f"sys/block/{disk}/queue"
        queue.mkdir(parents=True)
        (queue / "scheduler").write_text(scheduler)
        if disk != "loop0":
            (queue.parent / "device").mkdir()
    assert disks_that_weigh(tmp_path) == ["sda"]


def test_more_open_files_than_the_hard_limit_are_refused_without_the_capability() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if has_capability(CAP_SYS_RESOURCE) or hard == resource.RLIM_INFINITY:
        ProcessConfinement().check(Limits(open_files=hard))
    else:
        assert refusal(Limits(open_files=hard + 1)).limit == "open_files"


def test_limits_that_can_be_kept_are_taken() -> None:
    limits = Limits(
        allowed_cpus=CpuSet(os.sched_getaffinity(0)), memory_max=Bytes(1 << 30), tasks_max=100, nice=19,
        oom_score_adj=1000, open_files=64, slots=2,
    )  # fmt: skip
    ProcessConfinement().check(limits)


def test_every_limit_is_accounted_for_by_somebody_or_nobody() -> None:
    confinement: Confinement = ProcessConfinement(io_weighed=True)
    by = {name: confinement.enforcement(name) for name in Limits.__struct_fields__}
    assert {name for name, who in by.items() if who == "watched"} == {"memory_max", "tasks_max"}
    assert {name for name, who in by.items() if who == "process"} == {
        "allowed_cpus", "nice", "oom_score_adj", "open_files", "io_weight",
    }  # fmt: skip
    assert by["slots"] == "llmosd"


# -- launch settings and the watchdog -----------------------------------------------------------------------------


def test_a_new_worker_begins_with_its_limits_and_nothing_else() -> None:
    confinement = ProcessConfinement()
    assert confinement.launch_settings(Limits()) == LaunchSettings()
    limits = Limits(allowed_cpus=CpuSet([1, 0]), nice=5, io_weight=100, open_files=64, oom_score_adj=7)
    assert confinement.launch_settings(limits) == LaunchSettings((0, 1), 5, (2, 4), {"NOFILE": (64, 64)}, 7)


def test_io_weights_spread_over_the_eight_levels() -> None:
    assert [ionice_of(weight)[1] for weight in (1, 25, 50, 100, 150, 200, 10_000)] == [7, 7, 6, 4, 2, 0, 0]


def test_the_watchdog_says_which_limit_is_passed_and_by_what() -> None:
    over = ProcessConfinement().over_limit
    usage = Usage(memory_bytes=1288490189, threads=12, processes=3)
    assert over(Limits(memory_max=Bytes(1 << 30)), usage) == (
        "uses 1.2G of anonymous and shared memory; memory_max is 1G"
    )
    assert over(Limits(tasks_max=11), usage) == "has 12 threads in 3 processes; tasks_max is 11"
    assert over(Limits(memory_max=Bytes(2 << 30), tasks_max=12), usage) == ""
    assert over(Limits(), usage) == ""


def test_the_watchdog_sees_a_real_process_pass_its_limit(start: Start) -> None:
    process = start("import sys; own = b'x' * (64 << 20); print('ready', flush=True); sys.stdin.read()")
    assert said(process) == "ready"
    usage = sample([process.pid])
    assert "memory_max is 32M" in ProcessConfinement().over_limit(Limits(memory_max=Bytes(32 << 20)), usage)


def test_capabilities_are_those_the_kernel_shows() -> None:
    effective = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    assert has_capability(CAP_SYS_NICE) in (False, bool(effective >> CAP_SYS_NICE & 1))
