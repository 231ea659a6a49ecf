"""A booted Debian machine: 4 CPUs in 2 NUMA nodes, its own systemd, and commands run in it through QEMU's guest agent.

Always under software emulation: slow, and the same on every machine, also inside a virtual one. It has no network.
What it writes is gone with it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from image import CACHE, Image

#: Seconds. A boot takes 15 to 25 on an idle machine with two cores.
BOOT_S: Final = 180.0
#: For anything that a test waits for: emulation is slow, and this machine may be busy.
DEADLINE_S: Final = 90.0

_QEMU: Final = "qemu-system-x86_64"
_NODE_MEMORY: Final = "1G"


class Done(NamedTuple):
    """A command that ended."""

    status: int
    stdout: str
    stderr: str


class Guest:
    """One machine, from `boot` to its end."""

    def __init__(self, qemu: subprocess.Popen[bytes], agent: socket.socket) -> None:
        self._qemu = qemu
        self._agent = agent
        self._received = b""
        self._calls = 0
        #: Seconds from power-on until systemd had started everything.
        self.boot_s = self._wait_booted(not_boot_id="")

    def run(self, command: str, *, check: bool = True, timeout_s: float = DEADLINE_S) -> Done:
        """Run a command with bash. With `check`, a failure is an AssertionError that shows what it wrote."""
        call = {
            "path": "/usr/bin/timeout",
            "arg": ["--kill-after=5", f"{timeout_s:g}", "bash", "-c", command],
            "capture-output": True,
        }
        end = time.monotonic() + timeout_s + 30
        pid = self._call("guest-exec", end, **call)["pid"]
        while not (result := self._call("guest-exec-status", end, pid=pid))["exited"]:
            time.sleep(0.1)  # there is no other way to wait: the agent says nothing by itself
        done = Done(
            # Negative when a signal ended it, as in subprocess.
            result.get("exitcode", -result.get("signal", 0)),
            base64.b64decode(result.get("out-data", "")).decode(errors="replace"),
            base64.b64decode(result.get("err-data", "")).decode(errors="replace"),
        )
        if check and done.status != 0:
            raise AssertionError(f"{command}: exit status {done.status}\n{done.stdout}{done.stderr}")
        return done

    def out(self, command: str, *, timeout_s: float = DEADLINE_S) -> str:
        """What a command that succeeds writes, without the last line's end."""
        return self.run(command, timeout_s=timeout_s).stdout.rstrip("\n")

    def wait(self, what: str, test: str, *, deadline_s: float = DEADLINE_S) -> None:
        """Wait, in the guest, until a shell's test succeeds; fail with `what` after the deadline."""
        done = self.run(f"until {test}; do sleep 0.2; done", check=False, timeout_s=deadline_s)
        assert done.status == 0, f"after {deadline_s:g} s there is still no {what}: {test}\n{done.stderr}"

    def write(self, path: str, text: str) -> None:
        """Write a file, and make its directory."""
        data = base64.b64encode(text.encode()).decode()
        self.run(f"mkdir -p '{Path(path).parent}' && base64 -d <<<{data} >'{path}'")

    def reboot(self) -> float:
        """Reboot in order, and wait until everything was started again. Returns the seconds that it took."""
        boot_id = self._boot_id(time.monotonic() + DEADLINE_S)
        with contextlib.suppress(TimeoutError):
            self._call("guest-shutdown", time.monotonic() + 1, mode="reboot")  # no answer means success
        return self._wait_booted(not_boot_id=boot_id)

    def _wait_booted(self, *, not_boot_id: str) -> float:
        started = time.monotonic()
        end = started + BOOT_S
        while True:
            with contextlib.suppress(TimeoutError):
                self._synchronize(min(end, time.monotonic() + 5))
                if self._boot_id(min(end, time.monotonic() + 20)) != not_boot_id:
                    break
            assert time.monotonic() < end, f"the machine did not boot within {BOOT_S:g} s:\n{console()[-3000:]}"
        # `degraded`, where a unit failed, is for a test to find.
        self.run("systemctl is-system-running --wait", check=False, timeout_s=BOOT_S)
        return time.monotonic() - started

    def _boot_id(self, end: float) -> str:
        handle = self._call("guest-file-open", end, path="/proc/sys/kernel/random/boot_id", mode="r")
        read = self._call("guest-file-read", end, handle=handle)
        self._call("guest-file-close", end, handle=handle)
        return base64.b64decode(read["buf-b64"]).decode().strip()

    # -- the agent's protocol: lines of JSON, docs/interop/qemu-ga-ref in QEMU's documentation ----------------

    def _synchronize(self, end: float) -> None:
        """Find the agent, and drop what an earlier caller left unread."""
        self._calls += 1
        wanted = self._calls
        self._send("guest-sync", id=wanted)
        while self._receive(end).get("return") != wanted:
            pass

    def _call(self, name: str, end: float, **arguments: object) -> Any:
        self._send(name, **arguments)
        answer = self._receive(end)
        assert "return" in answer, f"{name}: {answer.get('error', answer)}"
        return answer["return"]

    def _send(self, name: str, **arguments: object) -> None:
        self._agent.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")

    def _receive(self, end: float) -> Any:
        """The next answer. Raises TimeoutError at `end`."""
        while b"\n" not in self._received:
            assert self._qemu.poll() is None, f"QEMU ended with status {self._qemu.returncode}:\n{console()[-3000:]}"
            self._agent.settimeout(max(0.001, end - time.monotonic()))
            data = self._agent.recv(65536)
            assert data, "QEMU closed the agent's channel"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


def console() -> str:
    """What the machine wrote to its serial console."""
    return (CACHE / "console.log").read_text(errors="replace")


@contextlib.contextmanager
def boot(image: Image) -> Iterator[Guest]:
    """A booted machine, ended in any case."""
    if shutil.which(_QEMU) is None:
        raise SystemExit(f"{_QEMU} is not installed: apt install qemu-system-x86")
    with (
        tempfile.TemporaryDirectory(prefix="llmosd-vm-", dir="/tmp") as directory,
        socket.socket(socket.AF_UNIX) as ear,
    ):
        # Connected by QEMU, so that there is nothing to wait for before it may be used.
        ear.bind(f"{directory}/agent.sock")
        ear.listen()
        ear.settimeout(30)
        # Ends with us, however we end; and leaves the CPUs to whoever else wants them.
        command = ["nice", "setpriv", "--pdeathsig=KILL", *_command(image, f"{directory}/agent.sock")]
        qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            agent, _ = ear.accept()
            with agent:
                yield Guest(qemu, agent)
        finally:
            qemu.kill()
            qemu.wait()


def _command(image: Image, agent: str) -> list[str]:
    nodes: list[str] = []
    for node in (0, 1):
        nodes += ["-object", f"memory-backend-ram,id=memory{node},size={_NODE_MEMORY}"]
        nodes += ["-numa", f"node,memdev=memory{node},cpus={2 * node}-{2 * node + 1}"]
    disk = "format=raw,if=virtio,snapshot=on,cache=unsafe"
    return [
        _QEMU, "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max", "-nodefaults", "-display", "none",
        "-smp", "4,sockets=2,cores=2,threads=1", "-m", "2G", *nodes,
        "-kernel", str(image.kernel), "-initrd", str(image.initrd),
        "-append", "root=/dev/vda rw quiet console=ttyS0 psi=1",
        "-drive", f"file={image.root},{disk}", "-drive", f"file={image.project},{disk}",
        "-serial", f"file:{CACHE / 'console.log'}",
        "-device", "virtio-serial", "-chardev", f"socket,id=agent,path={agent}",
        "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
    ]  # fmt: skip
