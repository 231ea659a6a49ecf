"""The `llmos` command: model files applied, removed and read again, and what each exit code stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import MODELS, done, fails, rows
from machine import SIMULATED, Machine, machine, wait_for


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    with machine() as made:
        for text in MODELS:
            made.model(text)
        made.start()
        yield made


# -- models -----------------------------------------------------------------------------------------------------------


def test_apply_takes_a_file_stdin_or_a_directory_and_rm_forgets(running: Machine, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.toml").write_text(SIMULATED.replace('"sim"', f'"{name}"'))
    assert done(running, "apply", str(tmp_path / "one.toml")) == "model one applied\n"
    assert (running.models / "one.toml").read_text() == (tmp_path / "one.toml").read_text()
    assert done(running, "apply", str(tmp_path)) == "model one applied\nmodel two applied\n"
    assert done(running, "apply", "-", stdin=SIMULATED.replace('"sim"', '"three"')) == "model three applied\n"
    assert len(done(running, "run", "three", "x", "--max-tokens", "2").split()) == 2
    for name in ("one", "two", "three"):
        assert done(running, "rm", name) == f"model {name} removed\n"
        assert not (running.models / f"{name}.toml").exists()
    wait_for("end of three", lambda: "three" not in [model["name"] for model in rows(running, "models")])
    fails(running, 4, "run", "three", "x")


def test_apply_of_a_directory_goes_on_past_a_wrong_file_and_names_it(running: Machine, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('modle = "a"')
    (tmp_path / "b.toml").write_text(SIMULATED.replace('"sim"', '"b"'))
    result = running.llmos("apply", str(tmp_path))
    assert result.returncode == 5
    assert result.stderr == f"llmos: {tmp_path}/a.toml: unknown key 'modle'; did you mean 'model'?\n"
    assert result.stdout == "model b applied\n"
    done(running, "rm", "b")


def test_reload_reads_the_directory_again_and_keeps_what_a_broken_file_had(running: Machine) -> None:
    file = running.models / "edited.toml"
    file.write_text(SIMULATED.replace('"sim"', '"edited"'))
    assert "edited" in done(running, "reload")
    file.write_text("broken")
    assert f"{file}: not valid TOML" in fails(running, 5, "reload")
    assert "edited" in [model["name"] for model in rows(running, "models")]
    file.unlink()
    assert "Removed: edited." in done(running, "reload")


# -- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "args", "words"),
    [
        (1, ("run", "slow", "x", "--max-tokens", "100", "--timeout", "0.2"), "its time ran out"),
        (2, ("ps", "--nonsense"), "See `llmos ps --help`"),
        (2, ("kill", "-s", "NOPE", "sim"), "'NOPE' is no signal"),
        (2, ("limits", "sim", "nice"), "'nice' is no NAME=VALUE"),
        (2, ("nonsense",), "No such command"),
        (2, ("apply", "/nonexistent.toml"), "does not exist"),
        (4, ("ps", "nope"), "no model or worker 'nope'; models: dying, sim, slow"),
        (4, ("stop", "nope"), "no model or worker 'nope'"),
        (4, ("run", "nope", "x"), "no model 'nope'; there are: "),
        (4, ("logs", "nope"), "no model or worker 'nope'"),
        (4, ("kill", "0123456789ab"), "0123456789ab"),
        (5, ("limits", "sim", "nise=5"), "did you mean 'nice'?"),
    ],
)  # fmt: skip
def test_the_exit_code_says_what_kind_of_failure_it_was(
    running: Machine, code: int, args: tuple[str, ...], words: str
) -> None:
    assert words in fails(running, code, *args)


def test_a_worker_is_not_removed_its_model_is(running: Machine) -> None:
    done(running, "start", "sim")
    assert "remove its model, sim" in fails(running, 5, "rm", "sim@1")


def test_without_a_daemon_the_exit_code_is_3_and_says_where_it_was_looked_for(a_machine: Machine) -> None:
    a_machine.runtime.mkdir(exist_ok=True)
    for args in (("ps",), ("run", "sim", "x"), ("status", "-o", "json")):
        said = fails(a_machine, 3, *args)
        assert str(a_machine.runtime) in said
        assert "Start llmosd" in said
    a_machine.start()
    a_machine.kill()
    assert "the daemon there has ended" in fails(a_machine, 3, "ps")


def test_the_log_of_the_daemon_has_time_and_level_once(running: Machine) -> None:
    for line in running.log().splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d [\d:,]+ (INFO|WARNING|ERROR) +[^:]", line), line
        assert "INFO:llmosd" not in line
