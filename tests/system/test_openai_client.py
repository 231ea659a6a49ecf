"""The official `openai` client against the gateway, over simulated engines: what users write, and what they catch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from machine import Machine, machine
from web import asking, wait_for_requests

MODELS = """
model = "sim"
aliases = ["gpt-small"]
[engine]
driver = "simulated"
load_time = 0
decode_rate = 500
"""
#: One slot and one place in the queue, and an answer that takes its time.
NARROW = """
model = "narrow"
[engine]
driver = "simulated"
load_time = 0
decode_rate = 5
[limits]
slots = 1
queue_max = 1
"""
BRIEF = """
model = "brief"
[engine]
driver = "simulated"
load_time = 0
decode_rate = 1
[limits]
request_timeout = "300ms"
"""
BROKEN = """
model = "broken"
[engine]
driver = "openai"
command = ["/nonexistent/server"]
[restart]
policy = "no"
"""
HELLO = [{"role": "user", "content": "one two three"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Machine]:
    with machine() as made:
        made.configure(gateway=True)
        for text in (MODELS, NARROW, BRIEF, BROKEN):
            made.model(text)
        made.start()
        yield made


@pytest.fixture
def client(served: Machine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def test_models_are_listed_and_found_by_name_and_by_alias(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {"sim", "gpt-small", "narrow"} <= set(listed)
    assert "gateway" not in listed
    assert listed["sim"].owned_by == "simulated"
    assert client.models.retrieve("gpt-small").id == "gpt-small"
    with pytest.raises(openai.NotFoundError, match="no model 'nope'"):
        client.models.retrieve("nope")


def test_a_completion_comes_whole_with_its_counts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="sim", prompt="one two three", max_tokens=5)
    assert len(answer.choices[0].text.split()) == 5
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)
    assert answer.id.startswith("cmpl-")
    assert answer.created > 0
    assert answer.model == "sim"


def test_a_streamed_completion_has_the_same_text_and_one_id(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="sim", prompt="a prompt", max_tokens=7).choices[0].text
    chunks = list(client.completions.create(model="sim", prompt="a prompt", max_tokens=7, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 6 + ["length"]


def test_a_chat_is_answered_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-small", messages=HELLO, max_completion_tokens=4)  # type: ignore[arg-type]
    message = answer.choices[0].message
    assert (answer.object, message.role) == ("chat.completion", "assistant")
    assert message.content is not None and len(message.content.split()) == 4
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="sim", messages=HELLO, max_tokens=4, stream=True
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content


def test_counts_come_with_a_stream_for_who_asks_for_them(client: openai.OpenAI) -> None:
    asked = {"model": "sim", "messages": HELLO, "max_tokens": 3, "stream": True}
    without = list(client.chat.completions.create(**asked))  # type: ignore[call-overload]
    assert all(chunk.usage is None and chunk.choices for chunk in without)
    *_, last = client.chat.completions.create(**asked, stream_options={"include_usage": True})  # type: ignore[call-overload]
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 3)


def test_many_asynchronous_streams_run_side_by_side(served: Machine) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        pieces = await client.completions.create(model="sim", prompt=f"prompt {number}", max_tokens=5, stream=True)
        return "".join([chunk.choices[0].text async for chunk in pieces])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            assert "sim" in [model.id async for model in client.models.list()]
            return await asyncio.gather(*(one(client, number) for number in range(32)))

    texts = asyncio.run(all_of_them())
    assert all(len(text.split()) == 5 for text in texts)
    assert len(set(texts)) > 1


def test_an_unknown_model_is_a_not_found_error_that_names_those_there_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"no model 'gpt-4'; there are: .*sim") as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("wrong", [{"max_tokens": "many"}, {"prompt": 3}, {"stream": "yes"}])
def test_a_wrong_parameter_is_a_bad_request_error(client: openai.OpenAI, wrong: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
        client.completions.create(model="sim", prompt="x", extra_body=wrong)


def test_what_an_engine_cannot_do_is_a_not_found_error_that_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not /v1/embeddings"):
        client.embeddings.create(model="sim", input="x")


def test_a_full_queue_is_a_rate_limit_error_that_says_when_to_come_again(
    served: Machine, client: openai.OpenAI
) -> None:
    def ask() -> openai.Stream[openai.types.Completion]:
        return client.completions.create(model="narrow", prompt="x", max_tokens=50, stream=True)

    running = ask()
    next(iter(running))
    with (
        asking(served, "narrow"),
        pytest.raises(openai.RateLimitError, match="queue_max is 1") as caught,
    ):
        wait_for_requests(served, "narrow", 2)
        ask()
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert caught.value.code == "rate_limit_exceeded"
    running.close()
    wait_for_requests(served, "narrow", 0)


def test_a_client_that_gives_up_takes_its_request_along(served: Machine, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(model="narrow", prompt="x", max_tokens=100)
    wait_for_requests(served, "narrow", 0)


def test_a_request_that_outlasts_the_models_time_is_not_asked_again(served: Machine) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=3) as eager:
        before = served.client.status().counters.get("accepted", 0)
        with pytest.raises(openai.InternalServerError, match="its time ran out") as caught:
            eager.completions.create(model="brief", prompt="x", max_tokens=100)
        assert caught.value.status_code == 504
        assert served.client.status().counters["accepted"] == before + 1


def test_a_model_that_cannot_be_started_says_why(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="cannot run /nonexistent/server") as caught:
        client.completions.create(model="broken", prompt="x")
    assert caught.value.status_code == 503


def test_an_error_names_the_request_as_ps_does(served: Machine, client: openai.OpenAI) -> None:
    stream = client.completions.create(model="narrow", prompt="x", max_tokens=100, stream=True)
    pieces = iter(stream)
    next(pieces)
    (running,) = served.client.requests("narrow")
    assert stream.response.headers["x-request-id"] == running.id
    served.client.kill(running.id)
    with pytest.raises(openai.APIError, match="cancelled"):
        list(pieces)
