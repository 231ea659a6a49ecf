"""A worker's own /tmp on a booted machine: it lasts as long as the worker, whatever becomes of the daemon."""

from __future__ import annotations

import pytest
from service import MODELS, UNIT, Service

pytestmark = pytest.mark.timeout(600)  # emulated, and the first test boots the machine

SERVER = """
import socket
own = socket.socket(socket.AF_UNIX)
own.bind("/tmp/own.sock")
own.listen()
print("listens", flush=True)
while True:
    own.accept()[0].send(b"still here")
"""
PRIVATE = """
model = "private"
kind = "service"
[engine]
driver = "command"
command = ["python3", "/opt/private.py"]
[ready]
log = "^listens$"
[isolation]
user = "nobody"
private_tmp = true
private_network = true
no_new_privileges = true
device_policy = "closed"
"""
ASK = """
import socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect(f"/proc/{sys.argv[1]}/root/tmp/own.sock")
print(asked.recv(64).decode())
"""


def test_a_workers_own_tmp_and_sockets_are_there_after_the_daemon_was_restarted_killed_and_upgraded(
    service: Service,
) -> None:
    service.guest.write("/opt/private.py", SERVER)
    service.guest.write("/opt/ask.py", ASK)
    service.guest.write(f"{MODELS}/private.toml", PRIVATE)
    service.llmos("reload")
    try:
        service.llmos("start", "private")
        pid = service.workers()["private"]
        assert service.guest.out(f"ps -o user= -p {pid}") == "nobody"
        assert service.guest.out(f"python3 /opt/ask.py {pid}") == "still here"
        assert service.run("test -e /tmp/own.sock", check=False).status == 1
        assert service.guest.out(f"ls /proc/{pid}/root/dev | grep --count '^vda' || true") == "0"
        service.run(f"systemctl restart {UNIT}")
        daemon = service.main_pid()
        service.run(f"kill -KILL {daemon}")
        service.wait_replaced(daemon)
        service.llmos("upgrade")
        assert service.workers()["private"] == pid
        assert service.guest.out(f"python3 /opt/ask.py {pid}") == "still here"
    finally:
        service.run(f"rm {MODELS}/private.toml && llmos reload")
