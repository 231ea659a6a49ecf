"""The examples are read by the code that reads a user's files, and the engine in them is run."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from llmosd import modelfile
from llmosd.kernel import spec

ROOT = Path(__file__).resolve().parents[2]
MODEL_FILES = sorted((ROOT / "examples" / "models.d").glob("*.toml"))


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_an_example_model_file_is_accepted_and_named_after_its_model(path: Path) -> None:
    assert modelfile.parse(path.read_text(), str(path)).model == path.stem


def test_there_is_an_example_for_each_driver() -> None:
    shown = {modelfile.parse(path.read_text(), str(path)).engine.driver for path in MODEL_FILES}
    assert shown == {driver.__struct_config__.tag for driver in get_args(spec.AnyEngine)}


def test_the_model_file_in_the_readme_is_accepted() -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        modelfile.parse(block, "README.md")


@pytest.mark.parametrize(
    ("path", "request_body"),
    [
        ("/v1/completions", {"prompt": "one two three"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "one two three"}]}),
    ],
)
def test_the_echo_engine_says_the_prompt_again(path: str, request_body: dict[str, Any]) -> None:
    module = load_echo_engine()
    module.WORD_S = 0

    async def collect() -> list[Any]:
        return [piece async for piece in module.generate(request_body, path=path)]

    assert asyncio.run(collect()) == ["one ", "two ", "three "]


def load_echo_engine() -> Any:
    location = ROOT / "examples" / "echo_engine.py"
    found = importlib.util.spec_from_file_location("echo_engine", location)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
