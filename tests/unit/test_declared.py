"""What is wrong with a file is said in its writer's words: file, key, what was expected, what was meant."""

from __future__ import annotations

import pytest

from llmosd.declared import TEXT_MAX, DeclarationError
from llmosd.modelfile import parse

TOP = 'model = "m"\n'
ENGINE = '[engine]\ndriver = "simulated"\n'
DRIVERS = "one of attached, command, llamacpp, openai, python, simulated"
SIMULATED_KEYS = "args, decode_rate, driver, env, load_time, prefill_rate"
LLAMA = TOP + '[engine]\ndriver = "llamacpp"\nweights = "w.gguf"\n'


def refusal(text: str) -> str:
    with pytest.raises(DeclarationError) as caught:
        parse(text, "m.toml")
    message = str(caught.value)
    assert message.startswith("m.toml: ")
    # Not a word of the machinery's.
    assert not any(word in message for word in ("`", "regex", "null", "enum", "object", "array", "msgspec"))
    return message.removeprefix("m.toml: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('modle = "m"\n' + ENGINE, "unknown key 'modle'; did you mean 'model'?"),
        (TOP + ENGINE + '[limits]\nmemory-max = "2G"', "unknown key 'limits.memory-max'; did you mean 'memory_max'?"),
        (TOP + ENGINE + '[limits]\nMEMORY_MAX = "2G"', "unknown key 'limits.MEMORY_MAX'; did you mean 'memory_max'?"),
        (TOP + ENGINE + "[resources]\nslots = 3", "unknown key 'resources.slots'; did you mean 'limits.slots'?"),
        (
            TOP + ENGINE + 'aliases = ["a"]',
            "unknown key 'engine.aliases'; it belongs to the top of the file, above all [tables], not into [engine]",
        ),
        (TOP + ENGINE + "[scale]\nzzz = 3", "unknown key 'scale.zzz'; known here: idle_timeout, max, min"),
        (TOP + ENGINE + '"" = 3', f"unknown key 'engine.'; known here: {SIMULATED_KEYS}"),
    ],
)
def test_an_unknown_key_is_named_with_the_one_that_was_meant(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'model' is missing"),
        (TOP, "'engine' is missing"),
        (TOP + "[engine]", f"'engine.driver' is missing; it is {DRIVERS}"),
        (TOP + '[engine]\ndriver = "llamacpp"', "'engine.weights' is missing"),
    ],
)
def test_a_missing_key_is_named(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 3\n" + ENGINE, "model: expected text, got 3"),
        (LLAMA + 'context = "4k"', "engine.context: expected a whole number of at least 8, got '4k'"),
        (LLAMA + "embeddings = 1", "engine.embeddings: expected true or false, got 1"),
        (LLAMA + 'args = "--x"', "engine.args: expected a list of texts, got '--x'"),
        (LLAMA + 'args = ["--x", 3]', "engine.args[1]: expected text, got 3"),
        (LLAMA + "env = { A = 3 }", "engine.env.A: expected text, got 3"),
        (LLAMA + "env = 3", "engine.env: expected a table of texts, got 3"),
        (TOP + "limits = 3\n" + ENGINE, "limits: expected a table, got 3"),
        (TOP + ENGINE + "[[limits]]\nnice = 1", "limits: expected a table, got a list"),
        (TOP + ENGINE + '[limits]\nnice = "low"', "limits.nice: expected a whole number from -20 to 19, got 'low'"),
        (TOP + ENGINE + "[limits]\nnice = 1.5", "limits.nice: expected a whole number from -20 to 19, got 1.5"),
        (TOP + ENGINE + "[limits]\nslots = true", "limits.slots: expected a whole number from 1 to 4096, got true"),
        (TOP + ENGINE + '[resources]\ncpus = "two"', "resources.cpus: expected a number from 0 to 8192, got 'two'"),
        (
            TOP + 'engine = "vllm"',
            "engine: expected a table with 'driver', which is one of attached, command, llamacpp, openai, python, "
            "simulated; got 'vllm'",
        ),
    ],
)
def test_a_wrong_type_is_said_in_tomls_words(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[limits]\nnice = 30", "limits.nice: expected a whole number from -20 to 19, got 30"),
        ("[limits]\nslots = 0", "limits.slots: expected a whole number from 1 to 4096, got 0"),
        ("[scale]\nmin = 3", "scale.max: 1 is less than scale.min, 3"),
        ('[limits]\nmemory_max = "2 gigs"', "limits.memory_max: expected a size such as 512M or 2G, got '2 gigs'"),
        ("[limits]\ncpu_quota = 50", "limits.cpu_quota: expected a percentage of one CPU such as 150%, got 50"),
        ('[limits]\nallowed_cpus = "a-b"', "limits.allowed_cpus: expected a set of CPUs such as 0-3,8, got 'a-b'"),
        (
            '[limits]\nrequest_timeout = "5 minutes"',
            "limits.request_timeout: expected a span of time such as 30s, 10m or 200ms, got '5 minutes'",
        ),
        ('[limits]\nmemory_max = "1G"\nmemory_high = "2G"', "limits.memory_high: is over memory_max"),
        ('[resources]\ngpu_memory = "1G"\ngpus = 0', "resources.gpus: gpu_memory is asked for, on no GPU"),
        (
            '[resources]\ncpus = 1.5\ncpu_placement = "exclusive"',
            "resources.cpus: exclusive CPUs are whole ones, at least 1; got 1.5",
        ),
        (
            '[resources]\ncpu_placement = "exclusive"',
            "resources.cpus: exclusive CPUs are whole ones, at least 1; got 0",
        ),
        (
            '[resources]\ncpus = 2\ncpu_placement = "exclusive"\n[limits]\nallowed_cpus = "3"',
            "limits.allowed_cpus: 3 has less than the 2 exclusive CPUs",
        ),
    ],
)
def test_a_wrong_quantity_says_what_a_right_one_looks_like(text: str, message: str) -> None:
    assert refusal(TOP + ENGINE + text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            TOP + '[engine]\ndriver = "llama.cpp"',
            "engine.driver: expected one of attached, command, llamacpp, openai, python, simulated, got 'llama.cpp'; "
            "did you mean 'llamacpp'?",
        ),
        (
            LLAMA + 'server = "whel"',
            "engine.server: expected one of auto, path, wheel, got 'whel'; did you mean 'wheel'?",
        ),
        (
            TOP + ENGINE + '[restart]\npolicy = "on_failure"',
            "restart.policy: expected one of always, no, on-abnormal, on-failure, on-success, got 'on_failure'; "
            "did you mean 'on-failure'?",
        ),
        (
            TOP + 'kind = "servce"\n' + ENGINE,
            "kind: expected one of model, service, got 'servce'; did you mean 'service'?",
        ),
    ],
)
def test_a_word_that_is_not_allowed_is_answered_with_those_that_are(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize("name", ["Gemma", "a b", "", "-x", "x" * 64, "ü", "a/b"])
def test_a_bad_name_is_answered_with_what_a_name_is_made_of(name: str) -> None:
    expected = "expected lower case letters, digits, '.', '_', '-'"
    assert refusal(f'model = "{name}"\n' + ENGINE).startswith(f"model: {expected}, got {name[:50]!r}"[:60])
    assert refusal(f'aliases = ["ok", "{name}"]\n' + TOP + ENGINE).startswith(f"aliases[1]: {expected}")


def test_a_pattern_is_answered_with_its_meaning() -> None:
    message = refusal(TOP + '[engine]\ndriver = "python"\nfunction = "module"')
    assert message == "engine.function: expected package.module:name or /path/file.py:name, got 'module'"


@pytest.mark.parametrize(
    "text",
    [
        "x y z",
        TOP + TOP,
        "n = " + "9" * 5000,
        "a = " + "[" * 5000,
        "\0",
        'x = """',
        "x = 2021-13-13",
    ],
)
def test_what_is_not_toml_is_said_to_be_so(text: str) -> None:
    assert refusal(text).startswith("not valid TOML: ")


def test_a_file_that_is_far_too_large_is_not_read() -> None:
    assert refusal("#" * (TEXT_MAX + 1)).startswith(f"has {TEXT_MAX + 1} characters")
