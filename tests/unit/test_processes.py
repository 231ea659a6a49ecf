"""To which group a process belongs, on real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from llmosd.node.processes import Claim, Processes
from llmosd.node.records import start_ticks

Start = Callable[[str], "subprocess.Popen[str]"]
#: A child in a session of its own with nothing in its environment, and its pid; then both sleep.
DETACHED = """
import subprocess, sys
child = subprocess.Popen(["/bin/sleep", "100"], start_new_session=True, env={})
print(child.pid, flush=True)
sys.stdin.read()
"""
#: Becomes, on a line, a program without its environment.
SHEDS = """
import os, sys
print("ready", flush=True)
sys.stdin.readline()
os.execve("/bin/sh", ["sh", "-c", "echo shed; read x"], {})
"""


def claim(pid: int, mark: str = "the test's") -> Claim:
    return Claim(pid, start_ticks(pid) or 0, f"TEST_GROUP={mark}".encode())


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_one_reading_tells_groups_apart_with_what_descends_from_each(start: Start) -> None:
    one, other = start(DETACHED), start(DETACHED)
    children = int(said(one)), int(said(other))
    found = Processes().read([claim(one.pid, "one"), claim(other.pid, "other"), claim(0)])
    assert [set(group) for group in found] == [{one.pid, children[0]}, {other.pid, children[1]}, set()]
    assert found[0][one.pid].startswith(b"%d (" % one.pid)


def test_a_mark_finds_whoever_has_no_leader_any_more() -> None:
    process = subprocess.Popen(["/bin/sleep", "100"], env={"TEST_GROUP": "the test's"}, start_new_session=True)
    try:
        # The leader is gone: nobody has that number.
        gone = Claim(2**22 + 1, 1, b"TEST_GROUP=the test's")
        assert [set(group) for group in Processes().read([gone])] == [{process.pid}]
    finally:
        process.kill()
        process.wait()


def test_a_mark_that_was_seen_stays_though_the_process_sheds_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SHEDS], env={"TEST_GROUP": "shed"}, start_new_session=True, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    gone = Claim(2**22 + 1, 1, b"TEST_GROUP=shed")
    processes = Processes()
    try:
        assert said(process) == "ready"
        assert set(processes.read([gone])[0]) == {process.pid}
        assert process.stdin is not None
        print(file=process.stdin, flush=True)
        assert said(process) == "shed"
        assert set(processes.read([gone])[0]) == {process.pid}
        assert Processes().read([gone]) == [{}]
    finally:
        process.kill()
        process.communicate()


def test_a_zombie_is_in_no_group(start: Start) -> None:
    process = start("pass")
    ours = claim(process.pid)
    while process.pid in Processes().read([ours])[0]:
        pass  # it ends; pytest's timeout bounds it
    assert Processes().read([ours]) == [{}]
