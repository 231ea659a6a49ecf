"""The habits of the project that a program can check: formatting, types, layers, sizes, generated files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from llmos.v1 import control_pb2

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "client" / "llmos" / "v1"
#: Code that people write and read here.
OURS = ("llmosd", "client/llmos", "tests", "docs", "examples", "bench")
#: A file that is longer does more than one thing.
LINES_MAX = 500


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """A tool of this environment, run in the root of the project."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


def passes(*command: str | Path) -> None:
    done = run(*command)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def our_files() -> Iterator[Path]:
    for folder in OURS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if STUBS not in path.parents:
                yield path


def test_ruff_finds_every_file_formatted() -> None:
    passes(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".")


def test_ruff_finds_nothing() -> None:
    passes(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_mypy_strict_finds_nothing() -> None:
    cache = ROOT / ".mypy_cache" if os.access(ROOT, os.W_OK) else Path(os.devnull)
    passes(sys.executable, "-m", "mypy", "--cache-dir", cache)


def test_every_part_imports_only_what_its_layer_may() -> None:
    passes(Path(sys.executable).with_name("lint-imports"), "--no-cache")


def test_the_protocol_is_imported_without_grpc() -> None:
    passes(sys.executable, "-c", "import llmos.protocol.client, sys; sys.exit('grpc' in sys.modules)")


def test_every_file_opens_by_saying_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in our_files()
        if path.name != "__main__.py" and (source := path.read_text()) and ast.get_docstring(ast.parse(source)) is None
    ]
    assert not silent


def test_no_file_does_everything() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in our_files()
        if (lines := path.read_text().count("\n")) > LINES_MAX
    }
    assert not long


def test_the_generated_documents_are_fresh() -> None:
    passes(sys.executable, ROOT / "docs" / "generate.py", "--check")


def test_the_grpc_stubs_are_fresh(tmp_path: Path) -> None:
    proto = "llmos/v1/control.proto"
    described = tmp_path / "described"
    passes(sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", f"--descriptor_set_out={described}", proto)
    (declared,) = FileDescriptorSet.FromString(described.read_bytes()).file
    # Compared as meaning: the text of the stubs changes with each release of the compiler.
    assert without_json_names(declared) == without_json_names(stub_descriptor()), "run `make proto`"
    services = (STUBS / "control_pb2_grpc.py").read_text()
    for service in declared.service:
        for method in service.method:
            path = f"/{declared.package}.{service.name}/{method.name}"
            assert f"'{path}'" in services, f"{path} is not in the stubs: run `make proto`"


def stub_descriptor() -> FileDescriptorProto:
    descriptor = FileDescriptorProto()
    control_pb2.DESCRIPTOR.CopyToProto(descriptor)
    return descriptor


def without_json_names(descriptor: FileDescriptorProto) -> FileDescriptorProto:
    """Only the compiler's own output has them."""
    for message in descriptor.message_type:
        pending = [message]
        while pending:
            nested = pending.pop()
            pending.extend(nested.nested_type)
            for field in nested.field:
                field.ClearField("json_name")
    return descriptor


def test_the_first_two_commands_of_the_readme_are_demo_and_test() -> None:
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    commands = [line.partition("#")[0].strip("$ ") for block in blocks for line in block.splitlines() if line]
    assert commands[:2] == ["make demo", "make test"]


def test_the_changelog_speaks_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_make_alone_lists_every_verb() -> None:
    declared = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make ([\w-]+)  ", run("make").stdout, re.MULTILINE)
    assert listed == declared[0].split()


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("proto/*.md")]), ids=lambda p: p.name
)
def test_a_link_inside_the_project_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]
