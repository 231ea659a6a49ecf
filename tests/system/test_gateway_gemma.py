"""The real Gemma behind the gateway, spoken to with the official `openai` client and with curl."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from machine import Machine, machine
from web import post

pytestmark = pytest.mark.model

GEMMA = """
model = "{name}"
[engine]
driver = "llamacpp"
weights = "{weights}"
context = 256
{more}
[limits]
slots = 2
"""
#: Small, and enough for a model that was not made for chat to go on with.
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}assistant:"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def served(gemma_weights: Path) -> Iterator[Machine]:
    with machine() as made:
        made.configure(gateway=True)
        for name, more in (
            ("plain", ""),
            ("chat", f"chat_template = '''{TEMPLATE}'''"),
            ("vectors", "embeddings = true"),
        ):
            made.model(GEMMA.format(name=name, weights=gemma_weights, more=more))
        made.start()
        yield made


@pytest.fixture
def client(served: Machine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_gemma_completes_the_same_text_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="plain", prompt=PROMPT, max_tokens=8, temperature=0)
    assert whole.choices[0].text.strip()
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 6
    assert whole.usage.completion_tokens == 8
    chunks = list(
        client.completions.create(
            model="plain",
            prompt=PROMPT,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (6, 8)
    assert {chunk.model for chunk in chunks} == {"plain"}


def test_chat_without_a_template_is_refused_and_says_what_to_do(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="plain has no chat template") as caught:
        client.chat.completions.create(model="plain", messages=[{"role": "user", "content": "hi"}])
    assert "engine.chat_template" in caught.value.message


def test_chat_with_a_template_is_answered_whole_and_streamed(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    asked = {"model": "chat", "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 8
    chunks = list(client.chat.completions.create(**asked, stream=True))  # type: ignore[call-overload]
    # Not the same text: the second one meets a warm prompt cache, and llama.cpp computes in other batches then.
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_embeddings_of_like_texts_are_alike(client: openai.OpenAI) -> None:
    texts = ["a dog runs in the park", "a puppy runs in the garden", "interest rates of central banks"]
    answer = client.embeddings.create(model="vectors", input=texts, encoding_format="float")
    dog, puppy, bank = (entry.embedding for entry in answer.data)
    assert len(dog) == 640
    assert answer.usage.prompt_tokens > 0

    def alike(one: list[float], other: list[float]) -> float:
        return sum(x * y for x, y in zip(one, other, strict=True))

    assert alike(dog, puppy) > alike(dog, bank)


def test_tokenize_passes_through_to_the_engine(served: Machine) -> None:
    answer = post(served, "/tokenize", {"model": "plain", "content": PROMPT})
    assert answer.status == 200, answer.body
    assert len(answer.json["tokens"]) == 5
    assert served.client.tokenize("plain", PROMPT) == answer.json["tokens"]


def test_what_the_engine_refuses_is_passed_on_in_its_own_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="plain", prompt="word " * 2000, max_tokens=4)
