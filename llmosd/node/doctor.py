"""`llmos doctor`: what this machine can and cannot do for workers, and how to get the rest.

`look` gathers facts and changes nothing; `diagnose` is a pure function of them. Every check that is not "ok" says what
to do. A machine without a GPU, without systemd or without root is a normal machine: "missing" is not an error.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from llmosd.kernel.spec import Isolation, Limits
from llmosd.kernel.units import Bytes
from llmosd.node.confine import Confinement
from llmosd.node.confine.process import least_nice
from llmosd.node.devices import Inventory, cgroup_directories

#: Descriptors that the daemon holds for a worker: pidfd, gate, log, connection, with some to spare.
_FILES_PER_WORKER: Final = 8
_FILES_BESIDES: Final = 512
_FILES_WANTED: Final = 1000 * _FILES_PER_WORKER + _FILES_BESIDES
#: sun_path, unix(7), less the terminating zero; the longest socket name of ours comes off.
_DIRECTORY_MAX: Final = 107 - len("/control.sock")

Result = Literal["ok", "limited", "missing"]


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at. `advice` is empty when there is nothing to do."""

    name: str
    result: Result
    message: str
    advice: str = ""


class Facts(msgspec.Struct, frozen=True):
    """What was found on a machine."""

    inventory: Inventory
    #: The maker that confines workers.
    maker: str
    #: Limits by who enforces them: "" is nobody.
    limits: dict[str, tuple[str, ...]]
    init: str
    systemd_booted: bool
    kernel: tuple[int, int]
    #: "unified", "hybrid", "v1" or "none".
    cgroup_layout: str
    #: Our own directory in the cgroup v2 tree; empty: there is none.
    cgroup_directory: str
    cgroup_writable: bool
    cgroup_controllers: frozenset[str]
    open_files: tuple[int, int]
    uid: int
    least_nice: int
    llamacpp_wheel: bool
    llama_server: str
    runtime_directory: str
    #: Why the runtime directory cannot be used; empty: it can.
    runtime_directory_trouble: str
    pressure: bool
    #: What of a model file's [isolation] cannot be had, and why.
    isolation: Mapping[str, str] = {}


def look(
    inventory: Inventory,
    confinement: Confinement,
    runtime_directory: Path,
    root: Path = Path("/"),
    isolation: Mapping[str, str] = {},
) -> Facts:
    """Gather the facts. `root` is where proc, sys and run are looked for; `isolation` was found out already."""
    limits: dict[str, tuple[str, ...]] = {}
    for name in Limits.__struct_fields__:
        by = confinement.enforcement(name)
        limits[by] = (*limits.get(by, ()), name)
    own = next(cgroup_directories(root, ""), None)
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    return Facts(
        inventory=inventory,
        maker=confinement.name,
        limits=limits,
        init=_text(root / "proc/1/comm") or "unknown",
        systemd_booted=(root / "run/systemd/system").is_dir(),  # sd_booted(3)
        kernel=(int(release[1]), int(release[2])) if release else (0, 0),
        cgroup_layout=_cgroup_layout(root),
        cgroup_directory=str(own or ""),
        cgroup_writable=own is not None and os.access(own, os.W_OK) and os.access(own / "cgroup.procs", os.W_OK),
        cgroup_controllers=frozenset(_text(own / "cgroup.controllers").split()) if own else frozenset(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        uid=os.getuid(),
        least_nice=least_nice(),
        llamacpp_wheel=importlib.util.find_spec("xllamacpp") is not None,
        llama_server=shutil.which("llama-server") or "",
        runtime_directory=str(runtime_directory),
        runtime_directory_trouble=_directory_trouble(runtime_directory),
        pressure=bool(_text(root / "proc/pressure/memory")),
        isolation=isolation,
    )


def diagnose(facts: Facts) -> list[Check]:
    """What the facts mean, in the order that people read it."""
    return [
        _systemd(facts),
        _cgroup(facts),
        _cgroup_kill(facts),
        _controller(facts, "memory", "memory_high, memory_max, swap_max", "memory_max is watched"),
        _controller(facts, "cpu", "cpu_weight, cpu_quota", "allowed_cpus and nice are what can be used"),
        _limits(facts),
        _pidfd(facts),
        _gpu(facts),
        _numa(facts),
        _memory(facts),
        _open_files(facts),
        _privileges(facts),
        _isolation(facts),
        _llamacpp(facts),
        _runtime_directory(facts),
        _pressure(facts),
    ]


def _systemd(facts: Facts) -> Check:
    if facts.maker == "systemd":
        return Check("systemd", "ok", "systemd runs this machine, and workers are scopes in llmos.slice")
    if facts.systemd_booted:
        message = f"systemd runs this machine, but workers are confined by {facts.maker}; the log says why at the start"
        return Check("systemd", "limited", message, "pip install 'llmosd[systemd]', and [node] confinement = \"auto\"")
    message = f"PID 1 is {facts.init}: no scopes, no systemctl for workers"
    return Check("systemd", "missing", message, "boot with systemd, or start the container with systemd as its init")


def _cgroup(facts: Facts) -> Check:
    where = f"{facts.cgroup_layout}, own cgroup {facts.cgroup_directory}"
    if facts.cgroup_layout in ("v1", "none"):
        message = "no cgroup v2 tree is mounted" + (", only v1" if facts.cgroup_layout == "v1" else "")
        return Check("cgroup v2", "missing", message, _UNIFIED)
    if not facts.cgroup_directory:
        return Check("cgroup v2", "missing", f"{facts.cgroup_layout}, but this process's own cgroup is not visible",
                     "mount /sys/fs/cgroup into the container")  # fmt: skip
    if not facts.cgroup_writable:
        return Check("cgroup v2", "limited", f"{where}, not writable", _DELEGATE)
    if facts.cgroup_layout == "hybrid":
        return Check("cgroup v2", "limited", f"{where}, writable; most controllers belong to v1", _UNIFIED)
    controllers = " ".join(sorted(facts.cgroup_controllers)) or "none"
    return Check("cgroup v2", "ok", f"{where}, writable, controllers: {controllers}")


def _cgroup_kill(facts: Facts) -> Check:
    name = "cgroup.kill and freezer"
    if facts.cgroup_writable and facts.kernel >= (5, 14):
        return Check(name, "ok", "a worker's processes can be killed and frozen all at once")
    message = "groups are found through /proc and killed process by process; freezing is SIGSTOP"
    if facts.cgroup_writable:
        return Check(name, "missing", message, f"needs Linux 5.14 or later; this is {_version(facts.kernel)}")
    return Check(name, "missing", message, _DELEGATE if facts.cgroup_directory else _UNIFIED)


def _controller(facts: Facts, controller: str, limits: str, instead: str) -> Check:
    name = f"{controller} controller"
    if controller in facts.cgroup_controllers and facts.cgroup_writable:
        return Check(name, "ok", f"this machine can enforce {limits}")
    if controller in facts.cgroup_controllers:
        return Check(name, "limited", f"there, but not writable for {limits}; {instead}", _DELEGATE)
    unified = facts.cgroup_layout == "unified"
    return Check(name, "missing", f"cannot enforce {limits}; {instead}", _DELEGATE if unified else _UNIFIED)


def _limits(facts: Facts) -> Check:
    groups = {by: ", ".join(names) for by, names in facts.limits.items() if by not in ("", "llmosd")}
    message = "; ".join(f"{by}: {names}" for by, names in sorted(groups.items()))
    if refused := facts.limits.get(""):
        advice = "leave the refused ones out of model files here; systemd or cgroup v2 would be needed for them"
        return Check("limits", "limited", f"{message}; refused: {', '.join(refused)}", advice)
    return Check("limits", "ok", message)


def _pidfd(facts: Facts) -> Check:
    if facts.kernel >= (6, 15):
        return Check("exit status", "ok", "known also for workers that an earlier daemon started (PIDFD_GET_INFO)")
    message = f"Linux {_version(facts.kernel)}: unknown for workers that an earlier daemon started, save by their host"
    return Check("exit status", "limited", message, "Linux 6.15 or later tells it")


def _gpu(facts: Facts) -> Check:
    gpus = facts.inventory.gpus
    why = "; ".join(gpus.notes)
    if not gpus.devices:
        advice = "on a machine with an NVIDIA GPU, install its driver; without one, nothing is wrong"
        return Check("GPU", "missing", why or "NVML counts no GPU", advice)
    seen = ", ".join(f"{gpu.name or gpu.uuid} ({Bytes(gpu.memory_bytes)})" for gpu in gpus.devices)
    if why:
        return Check("GPU", "limited", f"{seen}; {why}", "compare with `nvidia-smi -q`; a driver update may help")
    return Check("GPU", "ok", f"{seen}, driver {gpus.driver_version}")


def _numa(facts: Facts) -> Check:
    nodes = facts.inventory.numa_nodes
    if not nodes:
        return Check("NUMA", "missing", "the kernel shows no nodes", "a kernel built with CONFIG_NUMA shows them")
    return Check("NUMA", "ok", "; ".join(f"node {node.number}: CPUs {node.cpus or 'none'}" for node in nodes))


def _memory(facts: Facts) -> Check:
    inventory = facts.inventory
    message = f"{Bytes(inventory.memory_bytes)} of RAM, {Bytes(inventory.swap_bytes)} of swap"
    if inventory.memory_bytes < inventory.machine_memory_bytes:
        message += f"; the machine has {Bytes(inventory.machine_memory_bytes)}"
        return Check("memory", "limited", message, "raise the memory limit of the cgroup or container llmosd runs in")
    return Check("memory", "ok", message)


def _open_files(facts: Facts) -> Check:
    soft, hard = (float("inf") if limit == resource.RLIM_INFINITY else limit for limit in facts.open_files)
    message = f"soft limit {soft:g}, hard limit {hard:g}; 1000 workers need about {_FILES_WANTED}"
    if soft >= _FILES_WANTED:
        return Check("open files", "ok", message)
    way = f"`ulimit -n {_FILES_WANTED}` in the shell" if hard >= _FILES_WANTED else "`nofile` in limits.conf(5)"
    return Check("open files", "limited", message, f"LimitNOFILE=65536 in the unit, or {way} that starts llmosd")


def _privileges(facts: Facts) -> Check:
    who = "root" if facts.uid == 0 else f"uid {facts.uid}"
    message = f"runs as {who}; nice from {facts.least_nice} to 19"
    if facts.least_nice == -20:
        return Check("privileges", "ok", message)
    advice = "for lower nice values, AmbientCapabilities=CAP_SYS_NICE or LimitNICE=-20 in the unit"
    return Check("privileges", "limited", message, advice)


def _isolation(facts: Facts) -> Check:
    keys = Isolation.__struct_fields__
    if not facts.isolation:
        return Check("isolation", "ok", f"a worker can have {', '.join(keys)}")
    message = "; ".join(f"{key} is refused: {reason}" for key, reason in facts.isolation.items())
    advice = "run llmosd as root, in a container with CAP_SYS_ADMIN; for all but `user`, user namespaces will do"
    return Check("isolation", "missing" if len(facts.isolation) == len(keys) else "limited", message, advice)


def _llamacpp(facts: Facts) -> Check:
    found = ["the xllamacpp wheel"] * facts.llamacpp_wheel + [facts.llama_server] * bool(facts.llama_server)
    if found:
        return Check("llama.cpp", "ok", " and ".join(found))
    message = "neither the xllamacpp wheel nor a llama-server on PATH"
    return Check("llama.cpp", "missing", message, "pip install 'llmosd[llamacpp]', or install llama.cpp")


def _runtime_directory(facts: Facts) -> Check:
    path, trouble = facts.runtime_directory, facts.runtime_directory_trouble
    if trouble:
        advice = "log in through pam_systemd, or set XDG_RUNTIME_DIR to a directory of yours with mode 0700"
        return Check("runtime directory", "missing", f"{path}: {trouble}", advice)
    if len(os.fsencode(path)) > _DIRECTORY_MAX:
        return Check("runtime directory", "missing", f"{path} is too long for a unix socket's path (107 bytes)",
                     "set XDG_RUNTIME_DIR to a shorter path")  # fmt: skip
    return Check("runtime directory", "ok", path)


def _pressure(facts: Facts) -> Check:
    if facts.pressure:
        return Check("pressure (PSI)", "ok", "stalls for CPU, memory and disk are measured")
    advice = "boot with psi=1; the kernel needs CONFIG_PSI"
    return Check("pressure (PSI)", "missing", "the kernel does not measure stalls", advice)


_UNIFIED: Final = "boot with systemd.unified_cgroup_hierarchy=1 (or cgroup_no_v1=all) for cgroup v2 alone"
_DELEGATE: Final = "start llmosd as a service with Delegate=yes, or by `systemd-run --user --scope -p Delegate=yes`"


def _version(kernel: tuple[int, int]) -> str:
    return f"{kernel[0]}.{kernel[1]}"


def _cgroup_layout(root: Path) -> str:
    kinds = {line.split()[2] for line in _text(root / "proc/self/mounts").splitlines()} & {"cgroup", "cgroup2"}
    if kinds == {"cgroup", "cgroup2"}:
        return "hybrid"
    return {"cgroup": "v1", "cgroup2": "unified"}.get("".join(kinds), "none")


def _directory_trouble(path: Path) -> str:
    """Why `path` cannot be made or written to, or ""."""
    there = next((part for part in (path, *path.parents) if part.exists()), Path("/"))
    if not there.is_dir():
        return f"{there} is not a directory"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable for us"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # not there, which is the answer
