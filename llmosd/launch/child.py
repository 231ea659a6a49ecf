"""What every process that llmosd starts runs first: wait at the gate, set up, exec.

Run as ``python -I -S child.py FD`` with FD one end of a socketpair. Reads one line of JSON, the order; EOF before it
means that the parent is gone, and nothing runs. Applies the order step by step, closes what was not granted, and
execs. A step that fails is told through the socket as ``{"step", "errno", "error"}``; the exec closes it, which is
the success. Standard library only, and as few modules as can be: this start-up is paid by every worker.
"""

import _signal  # type: ignore[import-not-found]  # what `signal` is made of, without its enums
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes
    from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
#: include/uapi/linux/ioprio.h
IOPRIO_WHO_PROCESS = 1
IOPRIO_CLASS_SHIFT = 13
SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
#: asm/unistd_64.h, and asm-generic/unistd.h for the others.
SYS_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237, "riscv64": 237}
#: include/uapi/linux/mempolicy.h
MPOL_PREFERRED = 1
NOT_STARTED = 125
#: Python ignores these when it starts, and an exec keeps what is ignored.
IGNORED_BY_PYTHON = (_signal.SIGPIPE, _signal.SIGXFSZ)
AUTOGROUP_TRIES = 5


def main() -> None:
    gate = int(sys.argv[1])
    os.set_inheritable(gate, False)
    os.setsid()
    # Now, while the parent is busy with its side of the gate: it costs half of this start-up.
    import json

    line = read_line(gate)
    if not line.endswith(b"\n"):
        os._exit(NOT_STARTED)
    order = json.loads(line)
    step = "start"
    try:
        for step, apply in STEPS:
            if order.get(step) is not None:
                apply(order[step])
            if step == "nice":
                match_autogroup()
        step = "signals"
        for number in IGNORED_BY_PYTHON:
            _signal.signal(number, _signal.SIG_DFL)
        step = "close_fds"
        close_others({0, 1, 2, gate, *order["keep_fds"]})
        step = "exec"
        os.execvpe(order["argv"][0], order["argv"], order["env"])
    except (OSError, ValueError, OverflowError, LookupError, ImportError) as error:
        told = {"step": step, "errno": getattr(error, "errno", None) or 0, "error": str(error)}
        os.write(gate, json.dumps(told).encode())
        os._exit(NOT_STARTED)


def read_line(fd: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(fd, 1 << 16)
        if not piece:
            break
        line += piece
    return line


def set_rlimits(limits: "dict[str, list[int]]") -> None:
    for name, (soft, hard) in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))


def match_autogroup() -> None:
    """Nice counts only within a session where the kernel groups tasks by session: give the new group the same.

    sched(7), "The autogroup feature". An ordinary user's write is refused now and then with EAGAIN: a kernel-wide rate.
    """
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    for _ in range(AUTOGROUP_TRIES if nice else 0):
        try:
            with open("/proc/self/autogroup", "w") as file:
                file.write(str(nice))
            return
        except BlockingIOError:
            import time

            time.sleep(0.1)
        except OSError:
            return  # there are no autogroups, and nice counts as it is


def set_oom_score_adj(value: int) -> None:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(value))


def set_ionice(value: "list[int]") -> None:
    io_class, level = value
    call = SYS_IOPRIO_SET.get(os.uname().machine)
    if call is None:
        raise OSError(0, f"ioprio_set is not known on {os.uname().machine}")
    check(libc().syscall(call, IOPRIO_WHO_PROCESS, 0, io_class << IOPRIO_CLASS_SHIFT | level))


def prefer_memory_of(node: int) -> None:
    """set_mempolicy(2); an exec and what it starts keep it.

    Only a preference, so nothing to fail for: a container may forbid the call, and a node may be without memory. What
    is left then is the kernel's own policy, the memory nearest to the CPU, which comes to the same on the CPUs given.
    """
    call = SYS_SET_MEMPOLICY.get(os.uname().machine)
    if call is not None:
        import ctypes

        bits = ctypes.sizeof(ctypes.c_ulong) * 8
        mask = (ctypes.c_ulong * (node // bits + 1))()
        mask[node // bits] = 1 << node % bits
        # The kernel takes one bit less than it is told.
        libc().syscall(call, MPOL_PREFERRED, mask, ctypes.c_ulong(bits * len(mask) + 1))


def set_user(user: "dict[str, Any]") -> None:
    """Groups first, the user last: after that there is no way back, and a failure ends the launch."""
    os.setgroups(user["groups"])
    os.setresgid(user["gid"], user["gid"], user["gid"])
    os.setresuid(user["uid"], user["uid"], user["uid"])


def neighbour() -> "Any":
    """`isolate`, which lies beside this file: -I keeps that directory off the path, and most orders need none of it."""
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import isolate  # type: ignore[import-not-found]

    sys.path.pop()
    return isolate


def prctl(option: int, value: int) -> None:
    check(libc().prctl(option, value, 0, 0, 0))


def libc() -> "ctypes.CDLL":
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    if result < 0:
        import ctypes

        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def close_others(keep: "set[int]") -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                pass  # the descriptor of the listing itself
    for fd in keep - {0, 1, 2}:
        if fd != int(sys.argv[1]):
            os.set_inheritable(fd, True)


#: In this order; each takes the value of the order's field of that name.
STEPS = (
    ("umask", os.umask),
    ("rlimits", set_rlimits),
    ("oom_score_adj", set_oom_score_adj),
    ("cpu_affinity", lambda cpus: os.sched_setaffinity(0, cpus)),
    ("memory_node", prefer_memory_of),
    ("nice", lambda value: os.setpriority(os.PRIO_PROCESS, 0, value)),
    ("ionice", set_ionice),
    ("subreaper", lambda value: prctl(PR_SET_CHILD_SUBREAPER, int(value))),
    # After what only the daemon's own privileges allow: in a user namespace they count no more. Before the change of
    # user, for the same reason.
    ("namespaces", lambda value: neighbour().enter(value)),
    # After the mounts: a working directory from before them would be a way back behind them.
    ("cwd", os.chdir),
    # Needs CAP_SETPCAP, which the change of user takes.
    ("drop_capabilities", lambda value: neighbour().drop_capabilities(value)),
    ("user", set_user),
    ("no_new_privileges", lambda value: prctl(PR_SET_NO_NEW_PRIVS, int(value))),
    # After the change of user, which clears it.
    ("parent_death_signal", lambda value: prctl(PR_SET_PDEATHSIG, value)),
)

if __name__ == "__main__":
    main()
