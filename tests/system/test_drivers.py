"""The other engine families: any server command, an attached engine, a plain command, Python, and the simulation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from engine_models import ENGINES, SHORT, command, openai, simulated
from machine import Machine, free_port, machine, wait_for

from llmos.errors import EngineError, NotFound, Unsupported

ENGINE = ENGINES / "openai_like.py"


@pytest.fixture(scope="module")
def shared() -> Iterator[Machine]:
    with machine() as made:
        made.start()
        yield made


def get(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return json.load(answer)


def started(port: int, *args: str) -> subprocess.Popen[bytes]:
    """An engine that somebody else runs."""
    process = subprocess.Popen([sys.executable, ENGINE, "--port", str(port), *args], stdout=subprocess.DEVNULL)

    def answers() -> bool:
        try:
            return bool(get(port, "/health"))
        except OSError:
            return False

    wait_for("engine that answers", answers)
    return process


# -- any server command -----------------------------------------------------------------------------------------


def test_a_server_command_gets_its_port_key_headers_and_its_own_name_for_the_model(shared: Machine) -> None:
    client = shared.client
    key_file = shared.root / "key"
    key_file.write_text("secret\n")
    engine = f'served_name = "inner"\napi_key_file = "{key_file}"\nheaders = {{ x-team = "blue" }}'
    client.apply(
        openai("keyed", "openai_like.py", "--port", "{port}", "--key", "secret", "--served", "inner", engine=engine)
    )
    answer = client.run("keyed", "one two three", max_tokens=4)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == (" w0 w1 w2 w3", 3, 4)
    assert answer.tokens_exact and answer.data["model"] == "keyed"
    port = next(int(line.rpartition(" ")[2]) for line in client.logs("keyed@1") if line.startswith("serves on"))
    seen = get(port, "/seen")[-1]
    assert seen["body"]["model"] == "inner"
    assert (seen["headers"]["authorization"], seen["headers"]["x-team"]) == ("Bearer secret", "blue")
    assert client.embed("keyed", "hello") == [[0.5, -1.0]]


def test_a_key_file_that_cannot_be_read_is_the_reason_in_ps(shared: Machine) -> None:
    client = shared.client
    client.apply(openai("keyless", engine='api_key_file = "/no/such/key"'))
    client.start("keyless")
    assert "cannot read api_key_file /no/such/key" in shared.wait_worker("keyless@1", "failed").why
    client.stop("keyless")


@pytest.mark.parametrize("usage", [True, False])
def test_streams_count_tokens_with_and_without_the_engines_usage(shared: Machine, usage: bool) -> None:
    name = "usage" if usage else "no-usage"
    args = ("--port", "{port}") if usage else ("--port", "{port}", "--no-usage")
    shared.client.apply(openai(name, "openai_like.py", *args))
    pieces = shared.client.run(name, "one two", stream=True, max_tokens=5)
    assert "".join(piece.text for piece in pieces) == " w0 w1 w2 w3 w4"
    done = pieces.completion
    assert done is not None
    assert (done.completion_tokens, done.prompt_tokens, done.tokens_exact) == (5, 2 if usage else 0, usage)


def test_an_engines_error_comes_through_as_it_is(shared: Machine) -> None:
    shared.client.apply(openai("usage"))
    for stream in (False, True):
        with pytest.raises(EngineError, match="I am a teapot") as failed:
            answer = shared.client.run("usage", "teapot", stream=stream)
            list(answer)  # type: ignore[arg-type]
        assert failed.value.status == 418
        assert json.loads(failed.value.body)["error"]["from"] == "the engine itself"


def test_a_stream_that_breaks_off_is_an_error_and_not_a_short_answer(shared: Machine) -> None:
    shared.client.apply(openai("usage"))
    pid = shared.wait_worker("usage@1", "ready").pid
    answer = shared.client.run("usage", "drop", stream=True, max_tokens=20)
    assert [next(answer).text for _ in range(3)] == [" w0", " w1", " w2"]
    with pytest.raises(EngineError, match="broke off"):
        next(answer)
    assert shared.worker("usage@1").pid == pid


def test_a_reader_that_goes_away_takes_its_request_from_the_engine(shared: Machine) -> None:
    port = free_port()
    with started(port, "--rate", "20") as engine:
        shared.client.apply(attached("away", port))
        answer = shared.client.run("away", "on and on", stream=True, max_tokens=10_000)
        assert next(answer).text and get(port, "/active") == {"active": 1}
        answer.close()
        wait_for("idle engine", lambda: get(port, "/active") == {"active": 0}, 5)
        shared.client.remove("away")
        engine.kill()


# -- attached ---------------------------------------------------------------------------------------------------


def attached(name: str, port: int) -> str:
    return f'model = "{name}"\n[engine]\ndriver = "attached"\nurl = "http://127.0.0.1:{port}"\n{SHORT}'


def test_an_attached_engine_is_routed_to_never_touched_and_missed_when_it_goes(shared: Machine) -> None:
    client, port = shared.client, free_port()
    with started(port) as engine:
        client.apply(attached("elsewhere", port))
        assert client.run("elsewhere", "hello", max_tokens=3).text == " w0 w1 w2"
        before = shared.worker("elsewhere@1")
        assert before.engine_pid == 0
        client.restart("elsewhere")
        after = shared.wait_worker("elsewhere@1", "ready", not_pid=before.pid)
        assert engine.poll() is None
        engine.kill()
    gone = shared.wait_worker("elsewhere@1", "backoff", "loading", not_pid=after.pid)
    assert gone.restarts > after.restarts or "does not answer any more" in gone.why
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.run, "elsewhere", "hello", max_tokens=2)
        wait_for("request that waits", lambda: client.model("elsewhere").queue)
        with started(port) as engine:
            assert waiting.result(30).text == " w0 w1"
            client.remove("elsewhere")
            engine.kill()


# -- command ----------------------------------------------------------------------------------------------------


def test_a_command_is_supervised_logged_and_restarted_and_takes_no_requests(shared: Machine) -> None:
    client = shared.client
    script = 'echo "hello from $NAME"; exec sleep 1000'
    client.apply(command(["sh", "-c", script], name="plain", engine='env = { NAME = "plain" }'))
    client.start("plain")
    before = shared.wait_worker("plain@1", "ready")
    wait_for("output", lambda: "hello from plain" in list(client.logs("plain@1")))
    os.kill(before.pid, signal.SIGKILL)
    after = shared.wait_worker("plain@1", "ready", not_pid=before.pid)
    assert (after.restarts, after.last_exit) == (1, "killed by signal 9; its last line: hello from plain")
    wait_for("its output again", lambda: list(client.logs("plain@1")).count("hello from plain") == 2)
    with pytest.raises(NotFound, match="no model 'plain'"):
        client.run("plain", "hello")
    client.stop("plain")
    assert shared.wait_worker("plain@1", "stopped").last_exit == "killed by signal 15"


def test_a_command_that_ends_well_is_not_restarted(shared: Machine) -> None:
    client = shared.client
    client.apply(command(["true"], name="once"))
    client.start("once")
    assert shared.wait_worker("once@1", "stopped").restarts == 0


# -- python -----------------------------------------------------------------------------------------------------


def python(name: str, function: str) -> str:
    return f'model = "{name}"\n[engine]\ndriver = "python"\nfunction = "{function}"\n{SHORT}'


def test_a_python_generator_of_a_file_answers_whole_streamed_and_as_a_dict(shared: Machine) -> None:
    client = shared.client
    client.apply(python("words", f"{ENGINES}/functions.py:words"))
    whole = client.run("words", "hello", max_tokens=3)
    assert (whole.text, whole.completion_tokens) == (" completions0 completions1 completions2", 3)
    chat = "".join(piece.text for piece in client.run("words", "hello", stream=True, chat=True, max_tokens=2))
    assert chat == " completions0 completions1"
    client.apply(python("dicts", f"{ENGINES}/functions.py:as_dict"))
    assert client.embed("dicts", "hello") == [[1.0, 2.0]]


def test_a_python_generator_that_raises_fails_its_request_and_not_its_worker(shared: Machine) -> None:
    client = shared.client
    client.apply(python("raises", f"{ENGINES}/functions.py:raises"))
    for stream in (False, True):
        with pytest.raises(EngineError, match="raised ValueError: no more words"):
            list(client.run("raises", "hello", stream=stream))  # type: ignore[call-overload]
    assert shared.worker("raises@1").state == "ready" and shared.worker("raises@1").restarts == 0


def test_a_python_generator_is_closed_when_its_reader_goes_away(shared: Machine) -> None:
    client = shared.client
    client.apply(python("endless", f"{ENGINES}/functions.py:endless"))
    answer = client.run("endless", "go on", stream=True)
    assert next(answer).text
    answer.close()
    wait_for("closed generator", lambda: client.run("endless", "closed", stream=False).text == "1", 5)


def test_a_python_function_may_start_processes_and_gets_their_exit_status(shared: Machine) -> None:
    shared.client.apply(python("parent", f"{ENGINES}/functions.py:subprocess_status"))
    assert shared.client.run("parent", "hello").text == "7"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("no.such.module:f", "ModuleNotFoundError"),
        ("json:no_such", "no attribute 'no_such'"),
        ("/no.py:f", "there is no /no.py"),
    ],
)
def test_a_python_function_that_cannot_be_loaded_is_the_reason_in_ps(
    shared: Machine, function: str, reason: str
) -> None:
    shared.client.apply(python("unloadable", function))
    shared.client.start("unloadable")
    why = shared.wait_worker("unloadable@1", "backoff").why
    assert f"cannot load {function}" in why and reason in why
    shared.client.remove("unloadable")


# -- simulated --------------------------------------------------------------------------------------------------


def test_a_simulated_engine_keeps_its_declared_rates_and_says_that_it_is_simulated(shared: Machine) -> None:
    client = shared.client
    client.apply(simulated("slow", decode_rate=50, engine="prefill_rate = 100"))
    client.apply(simulated("fast", decode_rate=200, engine="prefill_rate = 400"))
    client.wait([*client.start("slow").workers, *client.start("fast").workers])

    def seconds(model: str, words: int, tokens: int) -> float:
        began = time.monotonic()
        client.run(model, "word " * words, max_tokens=tokens)
        return time.monotonic() - began

    # As ratios of one run: 40 tokens take 0.8 s and 0.2 s, 60 words 0.6 s and 0.15 s.
    assert 2.0 < seconds("slow", 0, 40) / seconds("fast", 0, 40) < 5.0
    assert 2.0 < seconds("slow", 60, 1) / seconds("fast", 60, 1) < 5.0
    answer = client.run("fast", "one two three", max_tokens=5)
    assert (answer.prompt_tokens, answer.completion_tokens, len(answer.text.split())) == (3, 5, 5)
    assert answer.data["system_fingerprint"] == "simulated"
    assert client.model("fast").simulated and shared.worker("fast@1").simulated
    assert "simulated" in shared.llmos("ps").stdout
    with pytest.raises(Unsupported, match="simulated engine serves"):
        client.embed("fast", "hello")
