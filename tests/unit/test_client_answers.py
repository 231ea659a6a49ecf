"""Reading what engines send and what logs say: garbage is a clear error, and nothing is shown twice or lost."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos import completions, errors
from llmos.following import arrived
from llmos.protocol import frames as f
from llmos.types import Worker

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "text", "delta", "message", "content", "error", "data", "embedding", "tokens"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.binary(max_size=40) | JSON.map(msgspec.json.encode))
def test_whatever_an_engine_sends_is_text_or_an_engine_error(payload: bytes) -> None:
    for read in (
        completions.read_piece,
        completions.read_completion,
        completions.read_embeddings,
        completions.read_tokens,
    ):
        try:
            read(payload)
        except errors.EngineError as error:
            assert error.body == payload


def test_signs_that_add_no_text_are_no_pieces() -> None:
    assert completions.read_piece(b"[DONE]") is None
    assert completions.read_piece(b'{"choices":[],"usage":{"completion_tokens":5}}') is None
    assert completions.read_piece(b'{"choices":[{"delta":{"role":"assistant"}}]}') is None
    last = completions.read_piece(b'{"choices":[{"delta":{},"finish_reason":"stop"}]}')
    assert last is not None
    assert last.finish_reason == "stop"


def test_an_error_in_the_midst_of_a_stream_is_an_exception() -> None:
    with pytest.raises(errors.EngineError, match="context is full"):
        completions.read_piece(b'{"error":{"message":"the context is full"}}')


@pytest.mark.parametrize("code", list(f.Code))
def test_every_code_of_the_bus_has_a_class_of_its_own(code: f.Code) -> None:
    error = errors.from_failed(f.Failed(1, 0, code, "what happened", status=500, retry_after_ms=250), b"{}")
    assert type(error) is not errors.LlmosError
    assert "what happened" in str(error)


def worker(name: str, state: str) -> Worker:
    return Worker(
        name=name, model="m", kind="model", driver="simulated", pid=0, engine_pid=0, state=state, why="", cpus=0,
        memory_reserved_bytes=0, cpu_percent=0, memory_bytes=0, memory_resident_bytes=0, gpus=(), gpu_memory_bytes=0,
        slots=1, slots_used=0, queue=0, restarts=0, uptime=0, progress=-1, last_exit="", simulated=True, processes=0,
        threads=0,
        cpu_set="",
    )  # fmt: skip


def test_all_that_are_waited_for_must_arrive() -> None:
    workers = [worker("m@1", "ready"), worker("m@2", "loading")]
    assert arrived({"m@1"}, workers, {"ready"}, {"failed"})
    assert not arrived({"m"}, workers, {"ready"}, {"failed"})
    assert not arrived({"m@1", "m@3"}, workers, {"ready"}, {"failed"})


def test_a_worker_that_is_not_there_any_more_is_stopped() -> None:
    assert arrived({"m@3"}, [], {"stopped"}, {"unkillable"})
    with pytest.raises(errors.WorkerFailed, match="not there any more"):
        arrived({"m@3"}, [], {"ready"}, {"stopped"})
