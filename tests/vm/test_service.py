"""The service's life under systemd: activation, readiness, watchdog, a killed daemon, a stop, a reboot."""

from __future__ import annotations

import json

import pytest
from service import SOCKETS, UNIT, Service

pytestmark = pytest.mark.timeout(600)  # emulated, and the first test boots the machine

COMPLETION = "http://127.0.0.1:8484/v1/completions"
BODY = json.dumps({"model": "sim", "prompt": "one two", "max_tokens": 3})
#: A request as any program makes it: it waits as long as it takes.
CURL = f"curl --silent --show-error --fail --json '{BODY}' {COMPLETION}"


def test_a_first_connection_starts_the_service(service: Service) -> None:
    service.run(f"systemctl stop {' '.join(SOCKETS)} {UNIT}")
    assert service.run("curl --silent http://127.0.0.1:8484/", check=False).status == 7, "nobody listens"
    service.run("systemctl start llmosd.socket")
    assert service.property("ActiveState") == "inactive"
    assert json.loads(service.guest.out(CURL))["usage"]["completion_tokens"] == 3
    assert service.property("ActiveState") == "active"
    assert {service.property("ActiveState", name) for name in SOCKETS} == {"active"}


def test_when_systemd_calls_it_started_it_serves(service: Service) -> None:
    service.run(f"systemctl restart {UNIT}")
    assert service.json("status")["state"] == "running"
    assert service.property("StatusText").startswith("serving ")
    assert service.property("Type") == "notify"
    assert "one two" not in service.llmos("run", "sim", "one two")


def test_a_client_that_connects_during_a_restart_waits_and_is_answered(service: Service) -> None:
    before = service.main_pid()
    answer = service.guest.out(f"systemctl --no-block restart {UNIT}; {CURL}")
    assert json.loads(answer)["usage"]["completion_tokens"] == 3
    assert service.wait_replaced(before) != before


def test_a_killed_daemon_is_replaced_and_the_next_one_adopts_its_workers(service: Service) -> None:
    service.llmos("run", "sim", "one")
    service.llmos("start", "stubborn")
    before, marks = service.workers(), service.marks()
    assert set(before) == {"gateway", "sim", "stubborn"}
    daemon = service.main_pid()
    service.run(f"kill -KILL {daemon}")
    service.wait_replaced(daemon)
    assert service.llmos("run", "sim", "one")
    assert json.loads(service.guest.out(CURL))["usage"]["completion_tokens"] == 3
    assert service.workers() == before
    assert set(service.processes()) >= set(before.values())
    assert service.marks() == marks and len(marks) == len(before)  # nobody was started a second time
    service.llmos("stop", "stubborn")


def test_a_daemon_that_stands_still_is_replaced_by_the_watchdog_and_its_workers_live(service: Service) -> None:
    override = f"/run/systemd/system/{UNIT}.d/watchdog.conf"
    service.guest.write(override, "[Service]\nWatchdogSec=10\n")  # not half a minute
    try:
        service.run(f"systemctl daemon-reload && systemctl restart {UNIT}")
        service.llmos("run", "sim", "one")
        before = service.workers()
        daemon = service.main_pid()
        service.run(f"kill -STOP {daemon}")
        service.wait_replaced(daemon)
        assert [line for line in service.journal() if "Watchdog timeout" in str(line["MESSAGE"])]
        assert service.llmos("run", "sim", "one")
        assert service.workers() == before
    finally:
        service.run(f"rm {override} && systemctl daemon-reload")


def test_a_stop_leaves_no_process_behind(service: Service) -> None:
    service.llmos("start", "stubborn")
    service.llmos("run", "sim", "one")
    assert len(service.processes()) >= 5  # gateway and sim; of the stubborn one three and its sleeps
    service.run(f"systemctl stop {' '.join(SOCKETS)} {UNIT}")
    assert service.processes() == []
    assert service.run("cat /sys/fs/cgroup/system.slice/llmosd.service/cgroup.procs", check=False).stdout == ""
    assert service.property("Result") == "success"


def test_the_journal_has_the_daemons_lines_with_their_priority(service: Service) -> None:
    lines = [line for line in service.journal() if line.get("SYSLOG_IDENTIFIER") == "llmosd"]
    (first, *_) = (line for line in lines if "serves /run/llmosd" in line["MESSAGE"])
    assert first["PRIORITY"] == "6"
    assert first["_TRANSPORT"] == "journal"
    assert first["LOGGER"] == "llmosd"
    assert not [line["MESSAGE"] for line in lines if "Traceback" in line["MESSAGE"]]


def test_a_reboot_brings_it_back(service: Service) -> None:
    service.guest.reboot()
    assert service.property("ActiveState") == "active"
    assert {service.property("ActiveState", name) for name in SOCKETS} == {"active"}
    assert service.guest.out("systemctl is-system-running") == "running"
    assert service.llmos("run", "sim", "one")
    # Records of workers die with the boot: nobody takes another process for one of them.
    assert set(service.workers()) == {"gateway", "sim"}
    before = service.run(f"journalctl --boot=-1 --unit={UNIT} --no-pager --output=cat").stdout
    assert "Stopped llmosd.service" in before, "the shutdown ended the service in order"
    assert "live on" not in before
