"""llama.cpp with the real Gemma, and with a stand-in for `llama-server` on PATH."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_models import ENGINES, SHORT, gemma
from machine import Machine, machine, wait_for

from llmos.errors import Cancelled, EngineError, Unsupported

PROMPT = "The capital of France is"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def shared(gemma_weights: Path) -> Iterator[Machine]:
    with machine() as made:
        made.model(gemma(gemma_weights))
        made.start()
        yield made


class UnixConnection(http.client.HTTPConnection):
    """HTTP on a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def slots(machine: Machine, worker: str) -> list[dict[str, Any]]:
    """What llama.cpp itself says of its slots, behind llmosd's back."""
    connection = UnixConnection(machine.runtime / "scratch" / worker / "engine.sock")
    connection.request("GET", "/slots")
    found: list[dict[str, Any]] = json.loads(connection.getresponse().read())
    connection.close()
    return found


@pytest.mark.model
def test_a_streamed_answer_is_the_same_as_a_whole_one_and_counts_are_the_engines(shared: Machine) -> None:
    client = shared.client
    whole = client.run("gemma", PROMPT, max_tokens=12, temperature=0)
    pieces = client.run("gemma", PROMPT, stream=True, max_tokens=12, temperature=0)
    assert "".join(piece.text for piece in pieces) == whole.text != ""
    streamed = pieces.completion
    assert streamed is not None
    prompt_tokens = len(client.tokenize("gemma", PROMPT)) + 1  # llama.cpp puts <bos> before it
    assert (whole.prompt_tokens, whole.completion_tokens, whole.tokens_exact) == (prompt_tokens, 12, True)
    assert (streamed.prompt_tokens, streamed.completion_tokens, streamed.tokens_exact) == (prompt_tokens, 12, True)


@pytest.mark.model
@pytest.mark.parametrize("how", ["the reader goes away", "llmos kill"])
def test_a_cancelled_request_leaves_llama_cpps_slot(shared: Machine, how: str) -> None:
    client = shared.client
    answer = client.run("gemma", "Once upon a time", stream=True, max_tokens=900, ignore_eos=True)
    assert next(answer).text
    assert any(slot["is_processing"] for slot in slots(shared, "gemma@1"))
    if how == "llmos kill":
        (request,) = client.requests("gemma")
        assert shared.llmos("kill", request.id).returncode == 0
        with pytest.raises(Cancelled, match="operator"):
            list(answer)
    else:
        answer.close()
    wait_for("idle slots", lambda: not any(slot["is_processing"] for slot in slots(shared, "gemma@1")), 3)
    wait_for("free slots", lambda: shared.worker("gemma@1").slots_used == 0, 3)


@pytest.mark.model
def test_chat_without_a_template_is_refused_with_the_reason_and_what_to_do(shared: Machine) -> None:
    with pytest.raises(Unsupported, match=r"no chat template.*chat_template"):
        shared.client.run("gemma", "hello", chat=True)


@pytest.mark.model
def test_chat_works_with_a_template_of_the_model_file(shared: Machine, gemma_weights: Path) -> None:
    client = shared.client
    client.apply(gemma(gemma_weights, name="chatty", slots=1, engine=f'chat_template = "{TEMPLATE}"'))
    assert client.run("chatty", PROMPT, chat=True, max_tokens=4, temperature=0).completion_tokens == 4
    client.stop("chatty")


@pytest.mark.model
def test_embeddings_come_from_a_model_that_serves_them(shared: Machine, gemma_weights: Path) -> None:
    client = shared.client
    client.apply(gemma(gemma_weights, name="vectors", slots=1, engine="embeddings = true"))
    one, same, other = client.embed("vectors", ["a dog", "a dog", "quantum field theory"])
    assert len(one) == 640 and one == pytest.approx(same, abs=1e-3) and one != pytest.approx(other, abs=1e-3)
    client.stop("vectors")


@pytest.mark.model
def test_an_error_of_llama_cpp_comes_with_its_own_words(shared: Machine) -> None:
    with pytest.raises(EngineError, match="context") as failed:
        shared.client.run("gemma", "word " * 4000, max_tokens=4)
    assert failed.value.status == 400


def test_llama_server_is_taken_from_the_path_with_llama_cpps_own_options(a_machine: Machine) -> None:
    (a_machine.models / "tiny.gguf").write_bytes(b"GGUF and no more")
    a_machine.model(gemma(Path("tiny.gguf"), name="path", engine='server = "path"\nargs = ["--no-mmap", "on"]'))
    a_machine.env["PATH"] = f"{ENGINES}:{os.environ['PATH']}"
    a_machine.start()
    said = json.loads(a_machine.client.run("path", PROMPT).text)
    options = said["options"]
    assert options["--model"] == str(a_machine.models / "tiny.gguf")
    assert (options["--ctx-size"], options["--parallel"], options["--no-mmap"]) == ("2048", "2", "on")
    assert said["cuda"] == ""


def test_without_llama_server_on_the_path_the_reason_is_given(a_machine: Machine) -> None:
    (a_machine.models / "tiny.gguf").write_bytes(b"GGUF and no more")
    rest = SHORT + "[scale]\nmin = 1\n"
    a_machine.model(gemma(Path("tiny.gguf"), name="path", engine='server = "path"', rest=rest))
    a_machine.env["PATH"] = "/nowhere"
    a_machine.start()
    assert "put a llama-server on PATH" in a_machine.wait_worker("path@1", "backoff", "failed").why


@pytest.mark.model
def test_an_idle_engine_that_hangs_is_restarted_within_its_deadline(shared: Machine, gemma_weights: Path) -> None:
    client = shared.client
    liveness = '[liveness]\ninterval = "500ms"\ntimeout = "500ms"\nfailures = 2\n'
    client.apply(gemma(gemma_weights, name="hanging") + liveness)
    (name,) = client.start("hanging").workers
    before = shared.wait_worker(name, "ready")
    text = client.run("hanging", PROMPT, max_tokens=4, temperature=0).text
    began = time.time()
    os.kill(before.engine_pid, signal.SIGSTOP)
    after = shared.wait_worker(name, "ready", not_pid=before.pid)
    happened = {event.message: event.time for event in client.events() if event.subject == name}
    hung = happened["the engine hung: no answer on /health in 500ms, 2 times in a row"]
    assert hung - began < 0.5 * 2 + 0.5 + 2.0, "two seconds for a busy machine"
    assert (after.restarts, after.engine_pid != before.engine_pid) == (1, True)
    assert client.run("hanging", PROMPT, max_tokens=4, temperature=0).text == text
    client.remove("hanging")
