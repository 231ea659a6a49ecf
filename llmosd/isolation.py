"""What a model's [isolation] means on this machine: for the launcher, and for whoever asks whether it can be had.

For the daemon. It never widens what a worker may do: what a worker is made of (its Python, the bus, its weights) stays
in its sight, read-only where it would be hidden, and the rest is as the model's file says.
"""

from __future__ import annotations

import os
import pwd
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from llmosd.kernel.ledger import Grant
from llmosd.kernel.spec import Attached, Command, Isolation, LlamaCpp, ModelSpec, OpenAI, PythonFunction
from llmosd.launch.gate import Namespaces, Order, User
from llmosd.node import access
from llmosd.settings import Directories

#: include/uapi/linux/capability.h. With these a worker of root's could undo what isolates it: mounts and namespaces
#: (SYS_ADMIN), by other processes' (SYS_PTRACE), by file handles (DAC_READ_SEARCH), device nodes (MKNOD), the kernel
#: itself (SYS_MODULE, SYS_RAWIO, PERFMON, BPF).
UNDOING: Final = (2, 16, 17, 19, 21, 27, 38, 39)
_PRIVATE_TMP: Final = ("/tmp", "/var/tmp")
#: Written to when a process is launched, or by nothing that a path could protect.
_ALWAYS_WRITABLE: Final = ("/proc", "/dev")
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")
#: What every use of an NVIDIA GPU needs besides the GPU's own node.
_NVIDIA: Final = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
_NVIDIA_GPUS: Final = Path("/proc/driver/nvidia/gpus")
#: One file of weights that come in several (llama.cpp's gguf-split).
_SPLIT: Final = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")


class Account(msgspec.Struct, frozen=True):
    """A user of this machine."""

    user: User
    name: str
    home: str
    shell: str


class Isolator:
    """Isolates orders. One a daemon."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories

    def isolate(self, order: Order, spec: ModelSpec, grant: Grant, scratch: Path) -> Order:
        """The order with what the model's file asks for. Raises OSError or ValueError: it cannot be had."""
        isolation = spec.isolation
        if isolation == Isolation():
            return order
        user = account(isolation.user) if isolation.user else None
        self.admit(isolation)
        namespaces = self._namespaces(spec, grant, scratch, user)
        return msgspec.structs.replace(
            order,
            env=_environment(order.env, spec, user),
            namespaces=namespaces,
            drop_capabilities=UNDOING if namespaces or user else None,
            user=user.user if user else None,
            no_new_privileges=isolation.no_new_privileges or None,
        )

    def admit(self, isolation: Isolation) -> None:
        """Let a worker's user in to the bus: to its back socket, and to nothing else that lies there.

        Again for each daemon, whose socket is a new one. Raises OSError or ValueError.
        """
        if not isolation.user or (uid := account(isolation.user).user.uid) == 0:
            return
        runtime = self._directories.runtime
        try:
            access.allow(runtime, uid, access.SEARCH)
            access.allow(runtime / "scratch", uid, access.SEARCH)
            access.allow(runtime / "back.sock", uid, access.READ | access.WRITE)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot let user {isolation.user} in to {runtime}: {error.strerror}; put the runtime directory on a "
                "file system with access control lists (--runtime-dir)",
            ) from error

    def needed(self, spec: ModelSpec) -> list[str]:
        """What a worker must have in its sight, by every name it may go by. A `command` needs nothing of ours."""
        if isinstance(spec.engine, Command):
            return []
        places = (self._directories.runtime, self._directories.models, self._directories.state / "models")
        return _names((*places, *_code(), *self.named(spec)))

    def vital(self, spec: ModelSpec) -> list[str]:
        """What a worker of any model must be able to read, or it cannot even say what is wrong."""
        back = self._directories.runtime / "back.sock"
        return [] if isinstance(spec.engine, Command) else _names((back, *_code()))

    def named(self, spec: ModelSpec) -> Iterator[Path]:
        """The files that the model's file names, where the host looks for them."""
        engine = spec.engine
        names: list[str] = []
        if isinstance(engine, LlamaCpp):
            names = [engine.weights]
        elif isinstance(engine, PythonFunction):
            names = [engine.function.rpartition(":")[0]]
        elif isinstance(engine, OpenAI | Attached):
            names = [engine.api_key_file] if engine.api_key_file else []
        for name in names:
            for base in (self._directories.state / "models", self._directories.models):
                path = Path(os.path.normpath(base / Path(name).expanduser()))
                if path.is_file():
                    yield path
                    if _SPLIT.search(path.name):
                        yield from path.parent.glob(_SPLIT.sub("-*-of-*", path.name))

    def _namespaces(self, spec: ModelSpec, grant: Grant, scratch: Path, user: Account | None) -> Namespaces | None:
        isolation = spec.isolation
        closed = isolation.device_policy == "closed"
        # Another user's host has its log open, and no business in the directory.
        own = [] if isinstance(spec.engine, Command) else [scratch] if user else [scratch, self._directories.logs]
        writable = [str(path.absolute()) for path in own]
        needed = self.needed(spec)
        private = dict.fromkeys(private_tmp(isolation), 0o1777)
        if user is not None:
            # A directory that is closed to the user is replaced by one that shows what is needed of it.
            for path in (*needed, *writable):
                parent = access.closed_parent(Path(path), user.user)
                if parent is not None and not is_below(str(parent), private):
                    private[str(parent)] = 0o755
        wanted = Namespaces(
            private_network=isolation.private_network,
            private=tuple(private.items()),
            read_only=tuple(os.path.normpath(path) for path in isolation.read_only_paths),
            # Never the private directory itself, nor what it lies in: that would show what it hides.
            readable=tuple(path for path in needed if not any(is_below(other, [path]) for other in private)),
            writable=(*writable, *(path for path in _ALWAYS_WRITABLE if not (closed and path == "/dev"))),
            devices=(*_DEVICES, *_gpu_devices(grant)) if closed else None,
        )
        asked = wanted.private_network or wanted.private or wanted.read_only or closed
        return wanted if asked else None


def account(name: str) -> Account:
    """Raises ValueError."""
    try:
        entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError:
        raise ValueError(f"there is no user {name!r} on this machine; `useradd --system {name}` makes one") from None
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return Account(User(entry.pw_uid, entry.pw_gid, groups), entry.pw_name, entry.pw_dir, entry.pw_shell)


def private_tmp(isolation: Isolation) -> list[str]:
    """The directories that `private_tmp` replaces: one may be a link to the other."""
    found = {Path(path).resolve() for path in _PRIVATE_TMP} if isolation.private_tmp else set[Path]()
    return sorted(str(path) for path in found if path.is_dir())


def is_below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def _names(paths: Iterable[Path]) -> list[str]:
    names = {name for path in paths for name in (path.absolute(), path.resolve())}
    return sorted(str(name) for name in names if name.exists())


def _code() -> Iterator[Path]:
    """Where Python and the packages of a worker are: what `python -P` has on its path, in this environment."""
    yield from (Path(sys.prefix), Path(sys.base_prefix))
    yield from (Path(entry) for entry in sys.path[not sys.flags.safe_path :] if entry)
    # The interpreter of a virtual environment is a link, perhaps to another link.
    path = Path(sys.executable)
    while path.is_symlink():
        path = path.parent / path.readlink()
        yield path


def _environment(env: dict[str, str], spec: ModelSpec, user: Account | None) -> dict[str, str]:
    """Whose home it is, and what of the daemon's own is not there; what the model's file sets counts before that."""
    env = dict(env)
    if user is not None:
        for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "TMPDIR"):
            env.pop(name, None)
        env |= {"HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell}
    if spec.isolation.private_tmp:
        env.pop("TMPDIR", None)
    return env | (spec.engine.env if isinstance(spec.engine, Command) else {})


def _gpu_devices(grant: Grant) -> tuple[str, ...]:
    """The nodes of the GPUs that were granted. Raises ValueError for one whose node nobody knows."""
    if not grant.gpus:
        return ()
    minors = {}
    for file in _NVIDIA_GPUS.glob("*/information"):
        lines = [line.partition(":") for line in file.read_text().splitlines()]
        fields = {name.strip(): value.strip() for name, _, value in lines}
        minors[fields.get("GPU UUID", "")] = fields.get("Device Minor", "")
    if missing := [uuid for uuid in grant.gpus if not minors.get(uuid)]:
        raise ValueError(
            f"device_policy: which device {missing[0]} is cannot be found in {_NVIDIA_GPUS}, so that the others cannot "
            "be closed; give the model whole GPUs, or leave `device_policy` out"
        )
    return (*_NVIDIA, *(f"nvidia{minors[uuid]}" for uuid in grant.gpus))
