"""Where a process is in the cgroup v2 tree, and what was counted there. For the node and for worker hosts."""

from __future__ import annotations

from pathlib import Path


def cgroup_of(pid: int | str) -> Path | None:
    """The cgroup v2 directory of a process, or of "self". None: no such tree is mounted, or it is gone."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        root = next(Path(fields[4]) for fields in mounts if fields[fields.index("-") + 1] == "cgroup2")
        of_process = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        inside = next(line for line in of_process if line.startswith("0::")).removeprefix("0::")
    except (OSError, StopIteration):
        return None
    return root / inside.lstrip("/")


def pairs(path: Path) -> dict[str, int]:
    """A flat keyed file such as cpu.stat or memory.events: a name and a number a line. Without its controller, {}."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(" ") for line in text.splitlines())}


def oom_kills(cgroup: Path | None) -> int:
    """How many processes of a cgroup the OOM killer has taken, for want of memory there or on the whole machine."""
    return pairs(cgroup / "memory.events").get("oom_kill", 0) if cgroup is not None else 0
