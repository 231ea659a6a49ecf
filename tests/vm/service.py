"""llmosd as a service of the test machine: installed as its administrator would, and looked at through systemd."""

from __future__ import annotations

import json
import shlex
from typing import Any, Final

from guest import DEADLINE_S, Done, Guest
from image import MOUNTED

UNIT: Final = "llmosd.service"
SOCKETS: Final = ("llmosd.socket", "llmosd-front.socket", "llmosd-back.socket")
MODELS: Final = "/etc/llmosd/models.d"

#: On the second node, to be seen there.
SIMULATED: Final = """
model = "sim"
[engine]
driver = "simulated"
load_time = "50ms"
decode_rate = 200
[limits]
allowed_cpus = "2-3"
[scale]
min = 1
"""

#: A tree that does not want to end: it forks away, leaves the session, and ignores TERM.
STUBBORN: Final = """
model = "stubborn"
kind = "service"
[engine]
driver = "command"
command = ["sh", "-c", "setsid sh -c 'trap : TERM; (sleep 1000 & ); while :; do sleep 1; done' & exec sleep 1000"]
[timeouts]
stop = "2s"
"""

INSTALL: Final = f"""
set -e
cd {MOUNTED}/systemd
install -m 644 -t /etc/systemd/system *.service *.socket *.slice
install -D -m 644 -t /etc/sysusers.d sysusers.d/*
install -D -m 644 -t /etc/tmpfiles.d tmpfiles.d/*
systemd-sysusers
systemd-tmpfiles --create
systemctl daemon-reload
systemctl enable --now {UNIT}
"""


class Service:
    """The installed service of a guest."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def install(self) -> None:
        """Install the units, enable and start them, with two models."""
        self.guest.write(f"{MODELS}/sim.toml", SIMULATED)
        self.guest.write(f"{MODELS}/stubborn.toml", STUBBORN)
        self.guest.run(INSTALL)

    def run(self, command: str, *, check: bool = True, timeout_s: float = DEADLINE_S) -> Done:
        return self.guest.run(command, check=check, timeout_s=timeout_s)

    def llmos(self, *args: str) -> str:
        """Run the `llmos` command."""
        return self.guest.out(shlex.join(["llmos", *args]))

    def json(self, *args: str) -> Any:
        return json.loads(self.llmos(*args, "--output=json"))

    def workers(self) -> dict[str, int]:
        """The pid of the worker of each model that has one."""
        return {worker["model"]: worker["pid"] for worker in self.json("ps") if worker["pid"]}

    def property(self, name: str, unit: str = UNIT) -> str:
        return self.guest.out(f"systemctl show --value --property={name} {unit}")

    def main_pid(self) -> int:
        return int(self.property("MainPID"))

    def wait_replaced(self, pid: int) -> int:
        """Wait until systemd runs another daemon, and it is ready."""
        show = f"systemctl show --value --property=MainPID {UNIT}"
        another = f'p=$({show}); [ "$p" != {pid} ] && [ "$p" != 0 ] && systemctl --quiet is-active {UNIT}'
        self.guest.wait("daemon in the place of the one that ended", another)
        return self.main_pid()

    def processes(self) -> list[int]:
        """Every process that a worker started, wherever it went: they inherit its mark."""
        found = self.run("grep --files-with-matches --null-data '^LLMOSD_GROUP=' /proc/[0-9]*/environ", check=False)
        return [int(path.split("/")[2]) for path in found.stdout.split()]

    def marks(self) -> set[str]:
        """The marks of all those processes: one for each life of a worker."""
        search = "grep --no-filename --null-data --text '^LLMOSD_GROUP=' /proc/[0-9]*/environ | tr '\\0' '\\n'"
        return set(self.run(search, check=False).stdout.split())

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """The unit's messages of this boot, oldest first, with all their fields."""
        lines = self.guest.out(shlex.join(["journalctl", "--boot", "--output=json", f"--unit={UNIT}", *matches]))
        return [json.loads(line) for line in lines.splitlines()]
