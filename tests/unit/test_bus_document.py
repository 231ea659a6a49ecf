"""Holds `proto/bus.md` and `llmos.protocol` together: every kind, field, type, default and constant, in order."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

from llmos.protocol import client, frames, host
from llmosd.kernel.params import Params

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "proto" / "bus.md").read_text()

ROUTES = {
    ("client", "daemon"): frames.FROM_CLIENT,
    ("daemon", "client"): frames.TO_CLIENT,
    ("worker", "daemon"): frames.FROM_WORKER,
    ("daemon", "worker"): frames.TO_WORKER,
}
CASES = [(route, kind, header) for route, kinds in ROUTES.items() for kind, header in kinds.items()]


def section(kind: frames.Kind, route: tuple[str, str]) -> str:
    """The text under the heading of `kind` on its way from the one to the other, ``### CHUNK (6): worker → daemon``."""
    for title, text in re.findall(r"^### (.+)\n((?:(?!^##).*\n?)*)", DOCUMENT, re.MULTILINE):
        name, _, ways = title.partition(": ")
        if name != f"{kind.name} ({kind.value})":
            continue
        hops = [stops for way in ways.split(", ") for stops in _hops(way)]
        if route in hops:
            return str(text)
    raise AssertionError(f"proto/bus.md has no section for {kind.name} from {route[0]} to {route[1]}")


def _hops(way: str) -> list[tuple[str, str]]:
    stops = way.split(" → ")
    return list(pairwise(stops))


def documented_fields(text: str) -> list[tuple[str, str, str]]:
    """(field, type, default) of each row of the first table of fields."""
    table = re.search(r"(?:^\| \d+ \|.*\n)+", text, re.MULTILINE)
    if table is None:
        return []
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table[0].splitlines()]
    assert [int(row[0]) for row in rows] == list(range(len(rows)))
    return [(row[1], row[2], row[3]) for row in rows]


def declared_fields(header: type[frames.Header]) -> list[tuple[str, str, str]]:
    hints = get_type_hints(header)
    return [(field.name, type_name(hints[field.name]), default_text(field)) for field in msgspec.structs.fields(header)]


def type_name(hint: Any) -> str:
    names = {bytes: "bin", str: "str", int: "int", float: "float", bool: "bool", type(None): "nil"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is tuple:
        return f"array of {type_name(get_args(hint)[0])}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(type_name(part) for part in get_args(hint))
    return str(hint.__name__)


def default_text(field: msgspec.structs.FieldInfo) -> str:
    if field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT:
        return "required"
    value = field.default
    if isinstance(value, bytes):
        value = value.decode()
    return "nil" if value is None else msgspec.json.encode(value).decode()


@pytest.mark.parametrize(("route", "kind", "header"), CASES, ids=lambda case: getattr(case, "name", None))
def test_every_kind_is_documented_with_its_fields_in_order(
    route: tuple[str, str], kind: frames.Kind, header: type[frames.Header]
) -> None:
    assert documented_fields(section(kind, route)) == declared_fields(header)


@pytest.mark.parametrize("nested", [frames.OpenRequest, frames.HeldRequest], ids=lambda nested: nested.__name__)
def test_the_arrays_inside_a_hello_are_documented(nested: type[frames.Header]) -> None:
    _, _, text = DOCUMENT.partition(f"`{nested.__name__}`, an array within the array:")
    assert documented_fields(text) == declared_fields(nested)


def test_the_table_of_kinds_has_every_number_and_direction() -> None:
    columns = [("client", "daemon"), ("daemon", "client"), ("daemon", "worker"), ("worker", "daemon")]
    documented = {
        (int(number), name, tuple(cell.strip() == "✓" for cell in cells.split("|")))
        for number, name, cells in re.findall(r"^\| (\d+) ([A-Z]+) \|((?:[ ✓]*\|){3}[ ✓]*)\|$", DOCUMENT, re.MULTILINE)
    }
    declared = {(kind.value, kind.name, tuple(kind in ROUTES[column] for column in columns)) for kind in frames.Kind}
    assert documented == declared


def test_every_code_has_a_row_in_order() -> None:
    text = section(frames.Kind.FAILED, ("worker", "daemon"))
    assert re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE) == [code.value for code in frames.Code]


def test_every_phase_is_named_in_order() -> None:
    text = section(frames.Kind.STATUS, ("worker", "daemon"))
    row = re.search(r"^\| 0 \| `phase`.*", text, re.MULTILINE)
    assert row is not None
    assert re.findall(r"`([a-z]+)`", row[0]) == ["phase", *(phase.value for phase in frames.Phase)]


def test_times_and_sizes_are_those_of_the_code() -> None:
    _, _, text = DOCUMENT.partition("## Times and sizes")
    documented = {name: float(value) for name, value in re.findall(r"^\| `(\w+)` \| ([\d.]+) ", text, re.MULTILINE)}
    constants = {
        name: float(value)
        for module in (client, host)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, int | float) and not name.endswith("_UNKNOWN")
    }
    params = Params(epoch=1, seed=1, ticket_key=b"")
    defaults = {
        name: float(getattr(params, name)) for name in ("body_max", "window", "answer_max", "resume_timeout", "linger")
    }
    assert documented == constants | defaults


def test_the_document_names_the_version() -> None:
    assert f"version {frames.VERSION}" in DOCUMENT
    assert f"| 0 | 2 | version ({frames.VERSION}), kind |" in DOCUMENT
