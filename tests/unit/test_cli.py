"""The `llmos` command against a small daemon: what it prints, for people and for programs, and its exit codes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmos import types
from llmos.cli import main
from llmos.cli.output import clean, size, span, table
from llmos.cli.reference import markdown
from tests.unit.fake_bus import WORDS
from tests.unit.fake_daemon import REQUEST_ID, FakeDaemon

TEXT = "".join(WORDS)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Llmos = Callable[..., Outcome]


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setenv("LLMOS_HOST", str(directory))
    with FakeDaemon(directory) as running:
        yield running


@pytest.fixture
def llmos(capsys: pytest.CaptureFixture[str]) -> Llmos:
    """Run the command in this process."""

    def run(*args: str) -> Outcome:
        code = main(args)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def in_a_terminal(*args: str, columns: int = 80, **environ: str) -> str:
    """What the command writes to a terminal."""
    master, slave = pty.openpty()
    try:
        command = [sys.executable, "-m", "llmos.cli", *args]
        variables = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", **environ}
        subprocess.run(command, stdin=slave, stdout=slave, stderr=slave, env=variables, timeout=60, check=False)
        os.set_blocking(master, False)
        return os.read(master, 1 << 16).decode()
    finally:
        os.close(master)
        os.close(slave)


# -- workers and requests -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("daemon")
def test_ps_shows_workers_in_columns_with_a_long_why_last(llmos: Llmos) -> None:
    outcome = llmos("ps")
    assert outcome.code == 0
    header, worker, failed = outcome.out.splitlines()
    assert header.split("  ")[0] == "WORKER"
    assert [name for name in header.split("  ") if name][-1].strip() == "WHY"
    assert worker.split() == [
        "gemma3-270m@1", "gemma3-270m", "4711", "ready", "1", "93.2", "512M", "-", "-", "2/4", "1", "1", "2m14s", "-",
    ]  # fmt: skip
    assert failed.endswith(r"the engine ended with status 1\x1b[31m before it was ready")


@pytest.mark.usefixtures("daemon")
def test_ps_leaves_out_what_has_no_process_unless_asked(llmos: Llmos) -> None:
    assert "sim@1" not in llmos("ps").out
    assert "sim@1" in llmos("ps", "-a").out
    assert "(simulated)" in llmos("ps", "-a").out


@pytest.mark.usefixtures("daemon")
def test_ps_gives_programs_the_same_in_bytes_and_seconds(llmos: Llmos) -> None:
    workers = llmos("ps", "-o", "json").json()
    assert list(workers[0]) == list(types.Worker.__struct_fields__)
    assert (workers[0]["memory_bytes"], workers[0]["uptime"], workers[0]["gpus"]) == (536870912, 134.5, [])
    assert workers[1]["why"] == "the engine ended with status 1\x1b[31m before it was ready"


@pytest.mark.usefixtures("daemon")
def test_ps_with_requests_shows_requests(llmos: Llmos) -> None:
    header, running, _ = llmos("ps", "-T").out.splitlines()
    for name in ("REQUEST", "MODEL", "WORKER", "TENANT", "STATE", "TOKENS", "AGE", "WAITED", "FIRST TOKEN"):
        assert name in header
    assert running.split() == [
        REQUEST_ID[:12], "gemma3-270m", "gemma3-270m@1", "uid:1000", "running", "12", "1.5s", "20ms", "110ms",
    ]  # fmt: skip
    assert [request["id"] for request in llmos("ps", "-T", "-o", "json").json()] == [REQUEST_ID, "ff" * 16]


def test_ps_says_so_when_nothing_runs(llmos: Llmos, daemon: FakeDaemon) -> None:
    for worker in daemon.control.workers.values():
        worker.state = "stopped"
    outcome = llmos("ps", "gemma3-270m")
    assert (outcome.code, outcome.out) == (0, "")
    assert "llmos ps -a" in outcome.err
    assert llmos("ps", "-o", "json").json() == []


@pytest.mark.usefixtures("daemon")
def test_top_shows_the_same_again_and_again(llmos: Llmos) -> None:
    outcome = llmos("top", "-T", "-n", "1")
    assert outcome.out.startswith("llmosd 0.1.0, up 1h02m: 1 workers, 2 requests running, 1 waiting\n\nWORKER")
    assert REQUEST_ID[:12] in outcome.out


# -- steering -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("daemon")
def test_start_waits_and_says_what_became_of_it(llmos: Llmos) -> None:
    outcome = llmos("start", "sim")
    assert outcome == Outcome(0, "sim@1 is ready, pid 5000.\n", "")
    assert llmos("stop", "sim") == Outcome(0, "sim@1 is stopped.\n", "")
    assert llmos("restart", "gemma3-270m").out == "gemma3-270m@1 is ready, pid 5000.\n"


@pytest.mark.usefixtures("daemon")
def test_start_that_fails_gives_the_reason_and_the_last_words(llmos: Llmos) -> None:
    outcome = llmos("start", "bad")
    assert outcome.code == 1
    *log, reason = outcome.err.splitlines()
    assert log[-2:] == [r"  | \x1b[2Jwiped", "  | last\twords"]
    assert len(log) == 10
    assert reason == "llmos: bad@1 has failed: the engine ended with status 1. See `llmos logs bad@1`."


@pytest.mark.usefixtures("daemon")
def test_start_without_waiting_comes_back_at_once(llmos: Llmos) -> None:
    assert llmos("start", "--no-wait", "bad") == Outcome(0, "Taken on: bad@1.\n", "")


def test_waiting_has_an_end(llmos: Llmos, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon.control, "_step", lambda: False)
    outcome = llmos("start", "--timeout", "0.2", "sim")
    assert outcome.code == 1
    assert "sim@1 is starting" in outcome.err


@pytest.mark.usefixtures("daemon")
def test_reset_clears_a_failure(llmos: Llmos) -> None:
    assert llmos("reset", "bad") == Outcome(0, "bad@1 is stopped.\n", "")


def test_kill_sends_signals_by_name_and_number(llmos: Llmos, daemon: FakeDaemon) -> None:
    assert llmos("kill", "-s", "KILL", "gemma3-270m") == Outcome(0, "SIGKILL went to gemma3-270m@1.\n", "")
    assert llmos("kill", "-s", "19", "gemma3-270m").out == "SIGSTOP went to gemma3-270m@1.\n"
    assert llmos("kill", "gemma3-270m").out == "SIGTERM went to gemma3-270m@1.\n"
    assert daemon.control.calls == ["KillWorkers 9", "KillWorkers 19", "KillWorkers 15"]


@pytest.mark.usefixtures("daemon")
def test_kill_cancels_a_request(llmos: Llmos) -> None:
    assert llmos("kill", REQUEST_ID[:8]).out == f"Request {REQUEST_ID[:8]} is cancelled.\n"


@pytest.mark.usefixtures("daemon")
def test_limits_are_shown_and_changed(llmos: Llmos) -> None:
    header, cpu_or_memory, *_ = llmos("limits", "gemma3-270m").out.splitlines()
    assert header == "LIMIT       CONFIGURED  IN FORCE  ENFORCED BY  USED  PEAK"
    assert cpu_or_memory == "memory_max  1G          1G        process      512M  700M"
    assert "memory_max  2G          2G" in llmos("limits", "gemma3-270m", "memory_max=2G").out
    (entry,) = llmos("limits", "gemma3-270m", "memory_max=", "-o", "json").json()
    assert (entry["worker"], entry["limits"][0]["configured"]) == ("gemma3-270m@1", "")


# -- models ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("daemon")
def test_models_shows_models(llmos: Llmos) -> None:
    _, first, *_ = llmos("models").out.splitlines()
    assert first.split() == ["gemma3-270m", "ready", "llamacpp", "1/2", "2", "1", "1", "700M", "-", "-"]
    assert "/models.d/gemma3-270m.toml" in llmos("models", "-v").out
    assert llmos("models", "-o", "json").json()[0]["aliases"] == ["small"]


@pytest.mark.usefixtures("daemon")
def test_apply_takes_a_file_stdin_or_a_directory(llmos: Llmos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, wrong = tmp_path / "a.toml", tmp_path / "b.toml"
    good.write_text('model = "a"')
    assert llmos("apply", str(good)).out == f"{good}: applied 11 characters\n"
    with good.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert llmos("apply", "-").out == "stdin: applied 11 characters\n"
    wrong.write_text('modle = "b"')
    outcome = llmos("apply", str(tmp_path))
    assert (outcome.code, outcome.out) == (5, f"{good}: applied 11 characters\n")
    assert outcome.err == f"llmos: {wrong}: unknown key 'modle', perhaps 'model' is meant\n"


@pytest.mark.usefixtures("daemon")
def test_rm_and_reload_say_what_has_changed(llmos: Llmos) -> None:
    assert llmos("rm", "sim") == Outcome(0, "model sim is removed\n", "")
    assert llmos("rm", "sim").code == 4
    assert llmos("reload") == Outcome(5, "Applied: sim.\n", "llmos: x.toml: no engine\n")


# -- run ------------------------------------------------------------------------------------------------------


def test_run_prints_the_text(llmos: Llmos, daemon: FakeDaemon) -> None:
    assert llmos("run", "gemma3-270m", "The capital", "of France is", "--max-tokens", "5") == Outcome(
        0, TEXT + "\n", ""
    )
    (request,) = daemon.bus.requests.values()
    assert json.loads(request.body) == {
        "model": "gemma3-270m", "prompt": "The capital of France is", "max_tokens": 5, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert llmos("run", "gemma3-270m", "x", "--no-stream", "--chat").out == TEXT + "\n"


@pytest.mark.usefixtures("daemon")
def test_run_gives_programs_the_counts(llmos: Llmos) -> None:
    assert llmos("run", "gemma3-270m", "x", "--json").json() == {
        "model": "gemma3-270m", "text": TEXT, "finish_reason": "", "prompt_tokens": 6, "completion_tokens": 5,
        "tokens_exact": True,
    }  # fmt: skip


def test_run_reads_the_prompt_from_stdin(
    llmos: Llmos, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_text("Zwölf\nBoxkämpfer\n")
    with (tmp_path / "prompt").open(encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert llmos("run", "gemma3-270m", "-").code == 0
    (request,) = daemon.bus.requests.values()
    assert json.loads(request.body)["prompt"] == "Zwölf\nBoxkämpfer"


@pytest.mark.usefixtures("daemon")
@pytest.mark.parametrize(
    ("model", "code", "said"),
    [
        ("nosuch", 4, "llmos: no model 'nosuch'. See `llmos models`.\n"),
        ("full", 5, "llmos: the queue of full is full\n"),
        ("broken", 1, "llmos: the engine answered 400: no chat template\n"),
    ],
)
def test_run_that_fails_says_why(llmos: Llmos, model: str, code: int, said: str) -> None:
    assert llmos("run", model, "x") == Outcome(code, "", said)


# -- looking --------------------------------------------------------------------------------------------------


def test_logs_shows_the_last_lines(llmos: Llmos, daemon: FakeDaemon) -> None:
    assert llmos("logs", "-n", "2", "gemma3-270m@1").out == "\x1b[2Jwiped\nlast\twords\n"
    assert len(llmos("logs", "gemma3-270m@1").out.splitlines()) == 100
    assert len(llmos("logs", "-n", "all", "gemma3-270m@1").out.splitlines()) == len(daemon.control.log)
    assert llmos("logs", "-n", "none", "gemma3-270m@1").code == 2


@pytest.mark.usefixtures("daemon")
def test_events_shows_what_happened(llmos: Llmos, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = llmos("events").out.splitlines()
    assert first.endswith("  starting    gemma3-270m@1  on its way")
    assert second.endswith("  ready       gemma3-270m@1")
    assert llmos("events", "-n", "1").out.splitlines() == [second]
    assert [json.loads(line)["cursor"] for line in llmos("events", "-o", "json").out.splitlines()] == [1, 2]
    assert llmos("events", "-f", "-n", "1").code == 2


@pytest.mark.usefixtures("daemon")
def test_status_devices_and_doctor_tell_about_daemon_and_machine(llmos: Llmos) -> None:
    status = llmos("status").out
    assert "llmosd: 0.1.0, running for 1h02m\n" in status
    assert "counted: accepted 12\n" in status
    assert llmos("status", "-o", "json").json()["memory_bytes"] == 41943040
    devices = llmos("devices")
    assert devices.out.splitlines()[2].split() == [
        "memory", "node0", "-", "16.0G", "700M", "-", "gemma3-270m@1", "-",
    ]  # fmt: skip
    assert devices.err == "llmos: no NVIDIA driver\n"
    assert llmos("devices", "-o", "json").json()["devices"][0]["total"] == 8
    doctor = llmos("doctor").out
    assert "pidfd      ok       Linux 6.1 has it\n" in doctor
    assert doctor.endswith("To get the rest:\n  cgroup v2: run llmosd as root\n")
    assert llmos("doctor", "-o", "json").json()[1]["result"] == "missing"


# -- failures -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("daemon")
@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["ps", "nosuch"], 4), (["start", "nosuch"], 4), (["logs", "nosuch"], 4), (["limits", "nosuch"], 4),
        (["start", "sim@1"], 5), (["limits", "gemma3-270m", "memory_maximum=1G"], 5),
        ([], 2), (["nosuch"], 2), (["ps", "--nosuch"], 2), (["run"], 2), (["limits", "gemma3-270m", "memory_max"], 2),
        (["kill", "-s", "NOTHING", "gemma3-270m"], 2), (["apply", "/nowhere.toml"], 2), (["start"], 2),
        (["--help"], 0), (["kill", "--help"], 0), (["--version"], 0),
    ],
)  # fmt: skip
def test_exit_codes(llmos: Llmos, args: list[str], code: int) -> None:
    outcome = llmos(*args)
    assert outcome.code == code
    if code:
        assert outcome.out == ""
        assert outcome.err.startswith("llmos: ") or "Usage:" in outcome.err
        assert "Traceback" not in outcome.err


def test_no_daemon_is_exit_code_3_and_names_the_places(
    llmos: Llmos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMOS_HOST", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    outcome = llmos("ps")
    assert outcome.code == 3
    assert f"{tmp_path}/llmosd/control.sock" in outcome.err
    assert "/run/llmosd" in outcome.err
    assert "LLMOS_HOST" in outcome.err
    outcome = llmos("--host", str(tmp_path), "ps")
    assert outcome.code == 3
    assert "--host names" in outcome.err


def test_an_interrupt_ends_a_follower_quietly(daemon: FakeDaemon) -> None:
    command = [sys.executable, "-m", "llmos.cli", "events", "-f"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err.strip()) == (130, b"")


def test_an_interrupt_cancels_the_request_that_runs(daemon: FakeDaemon) -> None:
    command = [sys.executable, "-m", "llmos.cli", "run", "endless", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(6)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err.strip()) == (130, b"")
    daemon.wait_for_cancel()


@pytest.mark.usefixtures("daemon")
def test_a_reader_that_has_enough_is_no_traceback() -> None:
    command = [sys.executable, "-m", "llmos.cli", "run", "endless", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(6)
        process.stdout.close()
        err = process.stderr.read()
        code = process.wait(timeout=20)
    assert (code, err) == (141, b"")


# -- terminals ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("daemon")
def test_states_are_coloured_on_a_terminal_unless_no_color_is_set(llmos: Llmos) -> None:
    assert "\x1b[32mready\x1b[0m" in in_a_terminal("ps", columns=200)
    assert "\x1b[" not in in_a_terminal("ps", columns=200, NO_COLOR="1")
    assert "\x1b[" not in llmos("ps").out


@pytest.mark.usefixtures("daemon")
def test_a_table_fits_the_terminal_and_is_whole_elsewhere(llmos: Llmos) -> None:
    assert max(len(line) for line in in_a_terminal("ps", columns=150, NO_COLOR="1").splitlines()) <= 150
    assert max(len(line) for line in llmos("ps").out.splitlines()) > 150


@pytest.mark.usefixtures("daemon")
def test_a_terminal_is_never_given_control_characters_from_outside() -> None:
    shown = in_a_terminal("logs", "-n", "2", "gemma3-270m@1")
    assert r"\x1b[2Jwiped" in shown
    assert "\x1b" not in shown


def test_shells_complete_verbs_and_names(daemon: FakeDaemon) -> None:
    def completed(words: str, position: int) -> list[str]:
        environ = {"_LLMOS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        command = [sys.executable, "-m", "llmos.cli"]
        done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=60, check=True)
        return [line.partition(",")[2] for line in done.stdout.splitlines() if line]

    assert completed("llmos re", 1) == ["reload", "restart", "reset"]
    assert completed("llmos start s", 2) == ["sim", "sim@1", "small"]
    assert completed("llmos run g", 2) == ["gemma3-270m"]
    daemon.stop()
    assert completed("llmos start s", 2) == []
    daemon.start()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_names_the_command(llmos: Llmos, shell: str) -> None:
    assert "_LLMOS_COMPLETE" in llmos("completion", shell).out


# -- the parts ------------------------------------------------------------------------------------------------


def test_the_reference_is_fresh() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
    assert page.read_text() == markdown(), "run: python -m llmos.cli.reference > docs/cli.md"


def test_quantities_are_short() -> None:
    assert [size(value) for value in (0, 512, 1536, 700 << 20, 16 << 30)] == ["-", "512B", "1.5K", "700M", "16.0G"]
    assert [span(value) for value in (0, 0.02, 1.5, 42, 134.5, 3725, 90061)] == [
        "-", "20ms", "1.5s", "42s", "2m14s", "1h02m", "1d01h",
    ]  # fmt: skip


def test_what_comes_from_outside_cannot_steer_a_terminal() -> None:
    assert clean("a\x1b[31mb\x07\x9b\u202ec\nd") == r"a\x1b[31mb\x07\x9b\u202ec\nd"
    assert clean("a\tb\n", keep="\t\n") == "a\tb\n"
    assert clean("Zwölf 👩‍💻") == "Zwölf 👩‍💻"


def test_a_table_of_nothing_has_its_header() -> None:
    assert table(("A", "B"), []) == "A  B"
