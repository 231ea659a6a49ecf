"""llmosd.toml, declared once: validation, `llmosd config` and the docs come from here. And where everything lives."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from llmosd.declared import DeclarationError, read_toml
from llmosd.health import is_of_this_machine
from llmosd.kernel.spec import Declared, doc
from llmosd.kernel.units import Bytes, Seconds

#: sun_path, unix(7): 108 bytes with the final 0.
_SOCKET_PATH_MAX: Final = 107


class Gateway(Declared, frozen=True, kw_only=True):
    """The OpenAI-compatible HTTP API."""

    enabled: Annotated[bool, doc("whether it runs")] = True
    listen: Annotated[
        str, Meta(pattern=r"^[^\s]+:[0-9]{1,5}$", description="address and port; only this machine's own addresses")
    ] = "127.0.0.1:8484"
    api_keys_file: Annotated[str, doc("a file with one API key a line, `key` or `tenant:key`; empty: no keys")] = ""


class Logs(Declared, frozen=True, kw_only=True):
    """Workers' logs."""

    max_size: Annotated[Bytes, doc("what a worker's log may take on disk")] = Bytes(32 << 20)
    journal: Annotated[
        Literal["auto", "yes", "no"],
        doc("whether workers' output also goes to systemd's journal; `auto`: when the daemon's own log goes there"),
    ] = "auto"
    level: Annotated[Literal["debug", "info", "warning", "error"], doc("of the daemon's own log")] = "info"


class Scheduler(Declared, frozen=True, kw_only=True):
    """What requests meet."""

    placement: Annotated[Literal["first_fit", "best_fit", "worst_fit"], doc("rule by which GPUs are chosen")] = (
        "best_fit"
    )
    body_max: Annotated[Bytes, doc("largest body of a request")] = Bytes(32 << 20)
    answer_max: Annotated[Bytes, doc("largest answer that is kept")] = Bytes(64 << 20)
    window: Annotated[int, Meta(ge=2, le=65536, description="answer items under way unacknowledged")] = 256
    requests_max: Annotated[int, Meta(ge=1, description="open requests in all")] = 100_000
    resume_timeout: Annotated[Seconds, doc("how long an answer waits for a client that is away")] = Seconds(30)


class Node(Declared, frozen=True, kw_only=True):
    """What the daemon keeps for itself and asks of this machine."""

    confinement: Annotated[
        Literal["auto", "systemd", "cgroup", "process"], doc("what confines workers; auto: the strongest there is")
    ] = "auto"
    reserve_memory: Annotated[Bytes, doc("RAM that is not given to workers")] = Bytes(512 << 20)
    orphan_timeout: Annotated[Seconds, doc("without a daemon for this long, a worker ends")] = Seconds(300)
    stop_timeout: Annotated[Seconds, doc("for all workers, when the daemon is stopped")] = Seconds(60)


class Settings(Declared, frozen=True, kw_only=True):
    """llmosd.toml."""

    gateway: Gateway = Gateway()
    logs: Logs = Logs()
    scheduler: Scheduler = Scheduler()
    node: Node = Node()


class Directories(msgspec.Struct, frozen=True):
    """Where everything lives."""

    config: Path
    runtime: Path
    state: Path
    logs: Path

    @property
    def models(self) -> Path:
        return self.config / "models.d"

    @property
    def front(self) -> str:
        return f"ipc://{self.runtime}/front.sock"

    @property
    def back(self) -> str:
        return f"ipc://{self.runtime}/back.sock"

    @property
    def control(self) -> str:
        return f"unix:{self.runtime}/control.sock"

    def make(self) -> None:
        """Create what is missing. Raises DeclarationError for a runtime directory in which no socket fits."""
        shortest = self.runtime / "control.sock"
        if len(os.fsencode(shortest)) > _SOCKET_PATH_MAX:
            raise DeclarationError(
                f"the runtime directory {self.runtime} is too long for sockets: their paths may have "
                f"{_SOCKET_PATH_MAX} bytes. Use a shorter one (--runtime-dir)."
            )
        for path, mode in ((self.config, 0o755), (self.state, 0o750), (self.logs, 0o750)):
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        self.models.mkdir(mode=0o755, exist_ok=True)
        self.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.runtime.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
            # In /tmp anybody may have made it before us, to give us orders through it.
            raise DeclarationError(
                f"the runtime directory {self.runtime} is not ours alone: it must be a directory of this user's that "
                "others cannot write to. Remove it, or use another one (--runtime-dir)."
            )
        (self.state / "models").mkdir(mode=0o755, exist_ok=True)


def directories(root: Path | None = None) -> Directories:
    """The system's for root, the XDG ones (Base Directory Specification 0.8) for anyone else, or all below `root`."""
    if root is not None:
        root = root.absolute()
        return Directories(root / "etc", root / "run", root / "lib", root / "log")
    if os.geteuid() == 0:
        return Directories(Path("/etc/llmosd"), Path("/run/llmosd"), Path("/var/lib/llmosd"), Path("/var/log/llmosd"))
    home = Path.home()
    state = Path(os.environ.get("XDG_STATE_HOME") or home / ".local/state") / "llmosd"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Directories(
        config=Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "llmosd",
        runtime=Path(runtime) / "llmosd" if runtime else Path(f"/tmp/llmosd-{os.geteuid()}"),
        state=Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share") / "llmosd",
        logs=state / "log",
    )


def read(path: Path) -> Settings:
    """The settings of a file, or the defaults where there is none. Raises DeclarationError."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError) as error:
        raise DeclarationError(f"{path}: cannot be read: {error}") from None
    settings = read_toml(text, Settings, str(path))
    host, _, port = settings.gateway.listen.rpartition(":")
    if int(port) > 65535:
        raise DeclarationError(f"{path}: gateway.listen: {port} is no port; they go to 65535")
    if not is_of_this_machine(host.strip("[]")):
        raise DeclarationError(
            f"{path}: gateway.listen: {host} can be reached from outside this machine, which needs TLS and tokens; "
            "listen on 127.0.0.1, and put a proxy with TLS in front"
        )
    return settings
