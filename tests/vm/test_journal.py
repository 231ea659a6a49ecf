"""What workers print, in the journal of a booted machine: found by worker and by model, whoever dies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from service import MODELS, Service

pytestmark = pytest.mark.timeout(600)  # emulated, and the first test boots the machine

CHATTY = """
model = "chatty"
kind = "service"
[engine]
driver = "command"
command = ["sh", "-c", "echo good morning; while :; do sleep 1; echo still here; done"]
"""


@pytest.fixture
def chatty(service: Service) -> Iterator[Service]:
    """A command that prints runs."""
    service.guest.write(f"{MODELS}/chatty.toml", CHATTY)
    service.run("systemctl reload llmosd")
    service.guest.wait("model", "llmos start chatty")
    yield service
    service.run(f"rm {MODELS}/chatty.toml && systemctl reload llmosd")


def entries(service: Service, *matches: str) -> list[dict[str, Any]]:
    lines = service.guest.out(f"journalctl --boot --output=json {' '.join(matches)}")
    return [json.loads(line) for line in lines.splitlines()]


def test_what_a_worker_prints_is_in_the_journal_with_its_fields(chatty: Service) -> None:
    find = "journalctl --boot --quiet LLMOS_WORKER=chatty@1 --grep='still here' >/dev/null"
    chatty.guest.wait("line in the journal", find)
    said = [entry for entry in entries(chatty, "LLMOS_WORKER=chatty@1") if entry["SYSLOG_IDENTIFIER"] == "llmos"]
    assert said[0]["MESSAGE"].startswith("llmosd: started, pid ")
    assert said[1]["MESSAGE"] == "good morning"
    assert {entry["LLMOS_MODEL"] for entry in said} == {"chatty"}
    assert {entry["PRIORITY"] for entry in said} == {"6"}
    assert all(entry["_SYSTEMD_UNIT"].startswith("llmos-log-writer-") for entry in said)


def test_what_a_host_says_and_what_the_daemon_says_of_a_worker_have_the_same_fields(service: Service) -> None:
    service.llmos("run", "sim", "one")
    said = {entry["SYSLOG_IDENTIFIER"]: entry["MESSAGE"] for entry in entries(service, "LLMOS_WORKER=sim@1")}
    assert set(said) == {"llmos", "llmosd"}
    messages = [entry["MESSAGE"] for entry in entries(service, "LLMOS_MODEL=sim")]
    assert "llmosd: the engine is ready" in messages
    assert any(message.startswith("sim@1 ready") for message in messages)


def test_a_workers_lines_go_on_over_a_killed_daemon_and_a_killed_log_writer(chatty: Service) -> None:
    worker = chatty.workers()["chatty"]
    for kill in (f"kill -KILL {chatty.main_pid()}", "pkill -KILL --full logs/[w]riter.py"):
        chatty.run(kill)
        after = chatty.guest.out("date +%s.%N")
        find = f"journalctl --boot --quiet --since=@{after} LLMOS_WORKER=chatty@1 --grep='still here' >/dev/null"
        chatty.guest.wait(f"line in the journal after {kill}", find)
    assert chatty.workers()["chatty"] == worker


def test_the_last_lines_of_a_dead_worker_are_shown_by_logs(chatty: Service) -> None:
    chatty.llmos("stop", "chatty")
    assert "ended: " in chatty.llmos("logs", "chatty").splitlines()[-1]
