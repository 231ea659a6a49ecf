"""Model files: garbage of any kind is refused with a DeclarationError and nothing else; and their directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmosd.declared import DeclarationError
from llmosd.kernel.spec import Limits, ModelSpec
from llmosd.kernel.units import decode_quantity, encode_quantity
from llmosd.modelfile import ModelDirectory, parse, parse_limits

GOOD = 'model = "m"\n[engine]\ndriver = "simulated"\n'
COMMAND = 'model = "m"\n[engine]\ndriver = "command"\ncommand = ["true"]\n'
SERVER = 'model = "m"\n[engine]\ndriver = "openai"\ncommand = ["true"]\n'
KEYS = sorted({
    name
    for kind in (ModelSpec, *(field.type for field in msgspec.structs.fields(ModelSpec)))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    for name in kind.__struct_fields__
})  # fmt: skip
QUANTITIES = st.sampled_from(["512M", "10m", "0-1", "50%", "simulated"])
SCALARS = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=12), QUANTITIES)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def toml(value: Any) -> str:
    """A value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(repr(value), repr(value))
    return json.dumps(value)


def check(text: str) -> None:
    """It is a model or a DeclarationError that is fit to be read; a model survives a journey as JSON."""
    try:
        spec = parse(text, "m.toml")
    except DeclarationError as error:
        assert str(error).startswith("m.toml: ")
        assert not any(word in str(error).partition(", got ")[0] for word in ("msgspec", "`int", "`str", "`object"))
        return
    data = msgspec.json.encode(spec, enc_hook=encode_quantity)
    assert msgspec.json.decode(data, type=ModelSpec, dec_hook=decode_quantity) == spec


@given(st.text())
def test_any_text_is_a_model_or_refused(text: str) -> None:
    check(text)


@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=5))
def test_any_toml_is_a_model_or_refused(data: dict[str, Any]) -> None:
    check("\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in data.items()))


@given(
    st.sampled_from(["limits", "resources", "scale", "restart", "timeouts", "ready", "liveness"]),
    st.sampled_from(KEYS),
    VALUES,
)
def test_any_value_of_a_key_that_is_known_is_taken_or_refused(table: str, key: str, value: Any) -> None:
    check(f"{GOOD}[{table}]\n{key} = {toml(value)}")


@given(st.data())
def test_a_good_file_with_a_damaged_place_is_a_model_or_refused(data: st.DataObject) -> None:
    text = (Path(__file__).parents[2] / "examples/models.d/gemma3-270m.toml").read_text()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    check(text[:start] + data.draw(st.text(max_size=10)) + text[end:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (COMMAND + '[ready]\nhttp = "http://example.org/"', "ready.http: example.org is not this machine"),
        (COMMAND + '[ready]\nhttp = "https://127.0.0.1/"', "ready.http: expected a URL such as http://127.0.0.1:8080/"),
        (COMMAND + "[ready]\nlog = '(unclosed'", "ready.log: '(unclosed' is not a regular expression: missing )"),
        (COMMAND + f"[ready]\nlog = '{'x' * 2000}'", "ready.log: has 2000 characters; at most 1000 are read"),
        (
            GOOD + "[ready]\nlog = 'x'",
            "ready: is for driver command; when an engine of driver simulated is ready, its host",
        ),
        (SERVER + "[ready]\nlog = 'x'", "when an engine of driver openai is ready, engine.ready_path tells"),
        (COMMAND + "[liveness]\ninterval = 3", "liveness: a command is only asked where liveness.http says what"),
        (COMMAND + '[liveness]\nhttp = "http://10.0.0.1/"', "liveness.http: 10.0.0.1 is not this machine"),
        (SERVER + '[liveness]\nhttp = "http://127.0.0.1/"', "liveness.http: is for driver command"),
        (SERVER + "[liveness]\ninterval = 0.01", "liveness.interval: at least 100ms, or 0 for never, got 10ms"),
        (SERVER + "[liveness]\ntimeout = 0", "liveness.timeout: nothing answers in no time"),
        (SERVER + "[liveness]\nfailures = 0", "liveness.failures: expected a whole number from 1 to 1000, got 0"),
        (GOOD + "[liveness]\ninterval = 3", "liveness: an engine of driver simulated lives in its host"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(text: str, message: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        parse(text, "m.toml")
    assert message in str(caught.value)


def test_what_can_be_asked_is_taken() -> None:
    url = "http://localhost:8080/health"
    spec = parse(f"{COMMAND}[ready]\nhttp = '{url}'\nlog = '^up$'\n[liveness]\nhttp = '{url}'\ninterval = 0", "m.toml")
    assert (spec.ready.http, spec.ready.log, spec.liveness.http) == (url, "^up$", url)
    assert spec.says_ready and not parse(COMMAND, "m.toml").says_ready
    assert parse(SERVER + "[liveness]\ninterval = 0\ntimeout = '1m'", "m.toml").liveness.timeout == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "gateway"\n[engine]\ndriver = "simulated"', "the name 'gateway' is kept for llmosd's own service"),
        ('aliases = ["gateway"]\n' + GOOD, "aliases: the name 'gateway' is kept"),
        ('aliases = ["m"]\n' + GOOD, "aliases: 'm' is the model's own name"),
        ('model = "m\\n"\n[engine]\ndriver = "simulated"', "ends with a line break"),
        (GOOD + 'args = ["a\\u0000b"]', "NUL character"),
        (GOOD + 'env = { "A=B" = "x" }', "engine.env: 'A=B' cannot be in an environment"),
    ],
)
def test_what_no_process_could_be_made_from_is_refused(text: str, message: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        parse(text, "m.toml")
    assert message in str(caught.value)


# -- limits on the command line --------------------------------------------------------------------------------------


def test_limits_of_the_command_line_are_read_like_those_of_a_file() -> None:
    parsed = parse_limits({"memory_max": "2G", "nice": "-5", "request_timeout": "30", "cpu_quota": "50%", "slots": "8"})
    assert parse_limits({"allowed_cpus": "0", "tasks_max": "9"}) == {"allowed_cpus": (0,), "tasks_max": 9}
    assert parsed == {"memory_max": 2 << 30, "nice": -5, "request_timeout": 30.0, "cpu_quota": 50, "slots": 8}


def test_an_empty_limit_means_its_default() -> None:
    assert parse_limits({"nice": "", "slots": ""}) == {"nice": None, "slots": Limits().slots}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("memory_mx", "1G", "limits: unknown key 'memory_mx'; did you mean 'memory_max'?"),
        ("zzz", "1", "limits: unknown key 'zzz'; known here: allowed_cpus, "),
        ("nice", "--5", "limits: nice: expected a whole number from -20 to 19, got '--5'"),
        ("nice", "²", "limits: nice: expected a whole number from -20 to 19, got '²'"),
        ("nice", "99", "limits: nice: expected a whole number from -20 to 19, got 99"),
        ("slots", "many", "limits: slots: expected a whole number from 1 to 4096, got 'many'"),
        ("cpu_quota", "50", "limits: cpu_quota: expected a percentage of one CPU such as 150%, got 50"),
    ],
)
def test_a_wrong_limit_is_refused_in_the_same_words(name: str, value: str, message: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        parse_limits({name: value})
    assert str(caught.value).startswith(message)


@given(
    st.dictionaries(st.sampled_from(Limits.__struct_fields__) | st.text(max_size=8), st.text(max_size=12), max_size=3)
)
def test_any_limits_are_read_or_refused(changes: dict[str, str]) -> None:
    try:
        parsed = parse_limits(changes)
    except DeclarationError:
        return
    assert parsed.keys() == changes.keys()


# -- the directory ----------------------------------------------------------------------------------------------------


def test_files_that_are_wrong_are_named_and_the_others_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    (tmp_path / "b.toml").write_text("nonsense")
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "d.toml").mkdir()
    (tmp_path / "e.toml").write_text(GOOD)
    (tmp_path / "f.txt").write_text("not ours")
    models, refused = ModelDirectory(tmp_path).read_all()
    assert {name: path.name for name, (_, path) in models.items()} == {"m": "a.toml"}
    assert [line.partition(":")[0].rpartition("/")[2] for line in refused] == ["b.toml", "c.toml", "d.toml", "e.toml"]
    assert "model 'm' is declared in" in refused[-1]


def test_a_model_is_kept_in_the_file_that_has_it_already(tmp_path: Path) -> None:
    directory = ModelDirectory(tmp_path)
    (tmp_path / "other-name.toml").write_text(GOOD)
    directory.keep(directory.place("m"), GOOD + "decode_rate = 5")
    assert [path.name for path in tmp_path.iterdir()] == ["other-name.toml"]
    assert "decode_rate" in (tmp_path / "other-name.toml").read_text()


def test_a_new_model_never_takes_the_place_of_another_ones_file(tmp_path: Path) -> None:
    directory = ModelDirectory(tmp_path)
    (tmp_path / "new.toml").write_text(GOOD)
    with pytest.raises(DeclarationError, match=r"new\.toml is the file of model 'm'"):
        directory.place("new")
    # But that of a broken one: whoever applies it again mends it.
    (tmp_path / "new.toml").write_text("broken")
    assert directory.place("new") == tmp_path / "new.toml"


def test_a_removed_model_takes_its_file_along(tmp_path: Path) -> None:
    directory = ModelDirectory(tmp_path)
    directory.keep(directory.place("m"), GOOD)
    assert directory.remove("m")
    assert not directory.remove("m")
    assert list(tmp_path.iterdir()) == []
