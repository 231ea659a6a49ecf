"""The `llmos` command against a real daemon: each verb, its JSON, its exit codes, its words when things fail."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ESCAPE, MODELS, done, fails, rows
from machine import Machine, machine, wait_for


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    with machine() as made:
        for text in MODELS:
            made.model(text)
        made.start()
        yield made


@pytest.fixture
def following(running: Machine) -> Iterator[Any]:
    """Starts `llmos` commands that go on and on; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def follow(*args: str) -> subprocess.Popen[str]:
        command = [str(Path(sys.executable).with_name("llmos")), *args]
        env = {**os.environ, "LLMOS_HOST": str(running.runtime), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        started.append(process)
        return process

    yield follow
    for process in started:
        process.kill()
        process.communicate()


# -- looking ----------------------------------------------------------------------------------------------------------


def test_ps_shows_workers_as_a_table_and_as_json_with_the_same_fields(running: Machine) -> None:
    done(running, "start", "sim")
    head, row = done(running, "ps", "sim").splitlines()
    columns = "WORKER MODEL PID STATE WHY CPUS CPU% MEMORY GPU MEM SLOTS QUEUE RESTARTS UPTIME"
    assert set(columns.split()) <= set(head.split())
    assert row.split()[:2] == ["sim@1", "sim"]
    (worker,) = rows(running, "ps", "sim")
    assert {"name", "model", "pid", "state", "why", "cpus", "cpu_percent", "memory_bytes", "gpus", "gpu_memory_bytes",
            "slots_used", "slots", "queue", "restarts", "uptime"} <= set(worker)  # fmt: skip
    assert (worker["name"], worker["state"], worker["pid"]) == ("sim@1", "ready", running.worker("sim@1").pid)


def test_every_verb_that_looks_answers_in_json(running: Machine) -> None:
    models = {model["name"]: model for model in rows(running, "models")}
    assert models["slow"]["aliases"] == ["snail"]
    assert models["slow"]["slots"] == 1
    status = rows(running, "status")
    assert (status["state"], status["models"], status["gateway_url"]) == ("running", 3, "")
    kinds = [device["kind"] for device in rows(running, "devices")["devices"]]
    assert {"cpu", "memory"} <= set(kinds)
    checks = rows(running, "doctor")
    assert {check["result"] for check in checks} <= {"ok", "limited", "missing"}
    assert all(check["advice"] for check in checks if check["result"] == "missing")
    limits = {limit["name"]: limit for limit in rows(running, "limits", "slow")[0]["limits"]}
    assert (limits["slots"]["configured"], limits["slots"]["enforced_by"]) == ("1", "llmosd")
    events = [json.loads(line) for line in done(running, "events", "-o", "json").splitlines()]
    assert {"cursor", "time", "kind", "subject", "model", "message"} == set(events[0])


@pytest.mark.parametrize("verb", ["ps", "models", "status", "devices", "doctor", "events"])
def test_tables_have_no_colour_in_a_pipe_and_nothing_on_stderr_but_notes(running: Machine, verb: str) -> None:
    result = running.llmos(verb)
    assert result.returncode == 0
    assert result.stdout.strip()
    assert ESCAPE not in result.stdout + result.stderr


def test_colours_are_for_terminals_and_no_color_takes_them_away(running: Machine) -> None:
    done(running, "start", "sim")
    env = {**os.environ, "LLMOS_HOST": str(running.runtime), "TERM": "xterm"}
    env.pop("NO_COLOR", None)

    def on_a_terminal(**more: str) -> str:
        master, slave = pty.openpty()
        command = [str(Path(sys.executable).with_name("llmos")), "ps", "sim"]
        try:
            subprocess.run(command, stdout=slave, env=env | more, check=True, timeout=30)
            return os.read(master, 10_000).decode()
        finally:
            os.close(master)
            os.close(slave)

    assert f"{ESCAPE}[32mready" in on_a_terminal()
    assert ESCAPE not in on_a_terminal(NO_COLOR="1")


def test_top_shows_the_workers_as_often_as_it_is_told(running: Machine) -> None:
    text = done(running, "top", "-n", "2", "-T")
    assert text.count("requests running") == 2


def test_completion_prints_a_script_that_completes_verbs_and_names(running: Machine) -> None:
    script = done(running, "completion", "bash")
    assert "_LLMOS_COMPLETE=bash_complete" in script
    env = {**os.environ, "LLMOS_HOST": str(running.runtime), "_LLMOS_COMPLETE": "bash_complete"}
    env |= {"COMP_WORDS": "llmos stop s", "COMP_CWORD": "2"}
    command = [str(Path(sys.executable).with_name("llmos"))]
    words = subprocess.run(command, capture_output=True, text=True, env=env, timeout=30, check=True).stdout
    assert {"plain,sim", "plain,slow", "plain,snail"} <= set(words.split())


# -- requests ---------------------------------------------------------------------------------------------------------


def test_run_prints_the_text_and_reads_a_prompt_from_stdin(running: Machine) -> None:
    text = done(running, "run", "sim", "a prompt", "--max-tokens", "5")
    assert len(text.split()) == 5
    assert done(running, "run", "sim", "-", "--max-tokens", "5", stdin="a prompt\n") == text
    answer = json.loads(done(running, "run", "sim", "a prompt", "--max-tokens", "5", "--json"))
    assert (answer["text"].strip(), answer["completion_tokens"], answer["prompt_tokens"]) == (text.strip(), 5, 2)


def test_a_request_is_seen_with_ps_and_cancelled_by_the_beginning_of_its_id(running: Machine, following: Any) -> None:
    process = following("run", "slow", "x", "--max-tokens", "1000")
    (request,) = wait_for("request", lambda: rows(running, "ps", "-T", "snail"))
    assert request["id"][:12] in done(running, "ps", "-T")
    said = done(running, "kill", request["id"][:8])
    assert request["id"][:8] in said and "cancelled" in said
    assert process.wait(20) == 1
    assert "cancelled by an operator" in process.stderr.read()
    wait_for("end of the request", lambda: rows(running, "ps", "-T", "slow") == [])


def test_an_interrupted_run_cancels_its_request(running: Machine, following: Any) -> None:
    process = following("run", "slow", "x", "--max-tokens", "1000")
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    # Not only once nobody has come back for it for a while.
    wait_for("end of the request", lambda: rows(running, "ps", "-T", "slow") == [], deadline_s=10)


# -- workers ----------------------------------------------------------------------------------------------------------


def test_start_stop_and_restart_come_back_when_it_is_so_and_say_what_happened(running: Machine) -> None:
    done(running, "start", "slow")
    first = running.worker("slow@1")
    assert first.state == "ready"
    assert done(running, "stop", "slow") == "slow@1 is stopped.\n"
    assert not Path(f"/proc/{first.pid}").exists()
    said = done(running, "start", "slow")
    second = running.worker("slow@1")
    assert said.splitlines()[-1] == f"slow@1 is ready, pid {second.pid}."
    said = done(running, "restart", "slow@1")
    third = running.worker("slow@1")
    assert said.splitlines()[-1] == f"slow@1 is ready, pid {third.pid}."
    assert len({first.pid, second.pid, third.pid}) == 3
    assert done(running, "stop", "slow", "--no-wait")
    done(running, "start", "slow")


def test_a_stopped_model_refuses_requests_and_says_how_to_start_it(running: Machine) -> None:
    done(running, "stop", "slow")
    assert "stopped by an operator" in (said := fails(running, 1, "run", "slow", "x"))
    assert "llmos start slow" in said
    done(running, "start", "slow")


def test_a_model_that_fails_to_start_shows_its_reason_and_its_last_words(running: Machine) -> None:
    said = fails(running, 1, "start", "dying")
    assert "dying@1 has failed" in said
    assert "exited with code 3" in said
    assert "  | tuning the strings" in said
    assert "  | the bow is broken" in said
    assert "llmos logs dying@1" in said
    (worker,) = rows(running, "ps", "-a", "dying")
    assert worker["state"] == "failed"
    assert "the bow is broken" in worker["why"]
    assert "the bow is broken" in done(running, "logs", "dying@1")
    assert "llmos reset dying" in fails(running, 1, "run", "dying", "x")
    assert done(running, "reset", "dying") == "dying@1 is stopped.\n"


def test_kill_sends_signals_and_says_to_whom(running: Machine) -> None:
    done(running, "start", "sim")
    old = running.worker("sim@1").pid
    assert done(running, "kill", "-s", "KILL", "sim") == "SIGKILL went to sim@1.\n"
    running.wait_worker("sim@1", "ready", not_pid=old)
    assert rows(running, "ps", "sim")[0]["restarts"] >= 1
    assert done(running, "kill", "-s", "STOP", "sim@1") == "SIGSTOP went to sim@1.\n"
    running.wait_worker("sim@1", "frozen")
    done(running, "kill", "-s", "CONT", "sim@1")
    running.wait_worker("sim@1", "ready")


def test_logs_are_followed_over_a_restart_of_the_worker(running: Machine, following: Any) -> None:
    done(running, "restart", "sim")
    process = following("logs", "-f", "-n", "1", "sim@1")
    first = process.stdout.readline()
    assert first.strip()
    done(running, "restart", "sim")
    lines = [process.stdout.readline() for _ in range(1)]
    while "the engine is ready" not in lines[-1]:
        lines.append(process.stdout.readline())
    assert lines.count(first) <= 1


def test_events_are_followed(running: Machine, following: Any) -> None:
    newest = json.loads(done(running, "events", "-n", "1", "-o", "json"))["cursor"]
    process = following("events", "-f", "-o", "json")
    done(running, "restart", "sim")
    kinds = []
    while kinds[-1:] != ["ready"]:
        event = json.loads(process.stdout.readline())
        if event["cursor"] > newest and event["subject"] == "sim@1":
            kinds.append(event["kind"])
    assert kinds == ["draining", "stopping", "exited", "stopped", "starting", "loading", "ready"]
