"""Writes the documents that are generated from declarations in the code, or with --check says which are stale.

`docs/models.md` and `docs/model.schema.json` come from `llmosd/kernel/spec.py`, `docs/settings.md` from
`llmosd/settings.py`, and the table of worker states in `docs/architecture.md` from `llmosd/kernel/lifecycle.py`. For
`make docs` and the tests. It must never hold a fact of its own about a key: what is missing here is missing in the
declaration.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from llmosd import settings
from llmosd.kernel import lifecycle, spec
from llmosd.kernel.units import Bytes, CpuSet, Percent, Seconds

DOCS: Final = Path(__file__).resolve().parent
REGENERATE: Final = "make docs"

TYPES: Final[dict[object, str]] = {
    str: "text",
    bool: "true or false",
    int: "whole number",
    float: "number",
    Bytes: "size",
    Seconds: "span of time",
    Percent: "percentage",
    CpuSet: "set of CPUs",
}
SECTIONS: Final[dict[str, type[spec.Declared]]] = {
    "resources": spec.Resources,
    "limits": spec.Limits,
    "scale": spec.Scale,
    "restart": spec.Restart,
    "timeouts": spec.Timeouts,
    "isolation": spec.Isolation,
    "ready": spec.Ready,
    "liveness": spec.Liveness,
}
UNITS: Final = """\
## Quantities

| | written as | for example |
|---|---|---|
| size | a whole number of bytes, or text with K, M, G or T: powers of 1024 | `"700M"` |
| span of time | a number of seconds, or text with ms, s, m, h or d | `"1.5h"` |
| percentage | text: percent of one CPU | `"150%"` |
| set of CPUs | text: numbers and ranges | `"0-3,8"` |
"""


# -- docs/models.md, docs/settings.md ----------------------------------------------------------------------------


def models_document() -> str:
    """Every key of a model file, a table a section."""
    parts = [
        "# Model files",
        f"<!-- Generated from llmosd/kernel/spec.py by `{REGENERATE}`. -->",
        "A model is a TOML file in `models.d`: `/etc/llmosd/models.d/` for a daemon run by root, else\n"
        "`~/.config/llmosd/models.d/`. One model a file. A key that is not listed here is refused with the nearest\n"
        "known name. Editors that read JSON schemas find one in [model.schema.json](model.schema.json); there is an\n"
        "example for each driver in [examples/models.d](../examples/models.d).",
        UNITS.rstrip(),
        "## The file",
        _sentence(spec.ModelSpec),
        _table(spec.ModelSpec, omit={"engine", *SECTIONS}),
        "## [engine]",
        "What to run: `driver` says which of these, and the rest of the section depends on it. All drivers have these\n"
        "two keys:",
        _table(spec.Engine),
    ]
    common = set(spec.Engine.__struct_fields__)
    for driver in get_args(spec.AnyEngine):
        parts += [f'### driver = "{_tag(driver)}"', _sentence(driver)]
        table = _table(driver, omit=common)
        parts += [table] if table else []
    for name, section in SECTIONS.items():
        parts += [f"## [{name}]", _sentence(section), _table(section)]
    return "\n\n".join(parts) + "\n"


def settings_document() -> str:
    """Every key of llmosd.toml, a table a section."""
    parts = [
        "# llmosd.toml",
        f"<!-- Generated from llmosd/settings.py by `{REGENERATE}`. -->",
        "The daemon's settings: `/etc/llmosd/llmosd.toml` for a daemon run by root, else\n"
        "`~/.config/llmosd/llmosd.toml`. The file may be missing, and so may each key. Sizes and spans of time are\n"
        "written as in [model files](models.md#quantities).",
    ]
    for field in msgspec.structs.fields(settings.Settings):
        parts += [f"## [{field.name}]", _sentence(field.type), _table(field.type)]
    return "\n\n".join(parts) + "\n"


def _sentence(section: type[spec.Declared]) -> str:
    return " ".join((section.__doc__ or "").split())


def _tag(driver: type[spec.Declared]) -> str:
    return str(driver.__struct_config__.tag)


def _table(section: type[spec.Declared], omit: Collection[str] = ()) -> str:
    hints = get_type_hints(section, include_extras=True)
    rows = [
        (f"`{field.name}`", _type_name(hints[field.name]), _default(field), _meaning(hints[field.name]))
        for field in msgspec.structs.fields(section)
        if field.name not in omit
    ]
    if not rows:
        return ""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _metas(hint: Any) -> Iterator[msgspec.Meta]:
    """What annotates a type, at any depth of an optional one."""
    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        yield from _metas(inner)
        yield from (extra for extra in extras if isinstance(extra, msgspec.Meta))
    elif get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from _metas(part)


def _meaning(hint: Any) -> str:
    descriptions = [meta.description for meta in _metas(hint) if meta.description]
    if not descriptions:
        raise ValueError(f"a key of type {hint} has no description")
    return descriptions[-1]


def _type_name(hint: Any) -> str:
    name = _bare_type_name(hint)
    least = [meta.ge for meta in _metas(hint) if meta.ge is not None]
    most = [meta.le for meta in _metas(hint) if meta.le is not None]
    above = [meta.gt for meta in _metas(hint) if meta.gt is not None]
    if least and most:
        return f"{name}, {least[-1]} to {most[-1]}"
    if least:
        return f"{name}, at least {least[-1]}"
    return f"{name}, above {above[-1]}" if above else name


def _bare_type_name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bare_type_name(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(_bare_type_name(part) for part in arguments if part is not type(None))
    if origin is Literal:
        return ", ".join(f'`"{value}"`' for value in arguments)
    if origin is tuple:
        return f"list of {_bare_type_name(arguments[0])}"
    if origin is dict:
        return f"table of {_bare_type_name(arguments[1])}"
    return TYPES[hint]


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None:
        return "none"
    if isinstance(value, Bytes | Seconds | Percent | CpuSet):
        return f'`"{value}"`'
    if value in ((), {}):
        return "empty"
    return f"`{json.dumps(value)}`"


# -- docs/model.schema.json -------------------------------------------------------------------------------------


def model_schema() -> str:
    """The same as JSON schema, for editors."""
    schema = msgspec.json.schema(_plain(spec.ModelSpec), schema_hook=_quantity_schema)
    titled = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A model file of llmosd"} | schema
    return json.dumps(titled, indent=2) + "\n"


@functools.cache
def _plain(section: type[spec.Declared]) -> type[msgspec.Struct]:
    """The same table with defaults as a file would write them: msgspec's schema writer knows no others."""
    config = section.__struct_config__
    hints = get_type_hints(section, include_extras=True)
    fields: list[Any] = []
    for field in msgspec.structs.fields(section):
        kind = hints[field.name]
        if kind == spec.AnyEngine:
            fields.append((field.name, functools.reduce(operator.or_, map(_plain, get_args(kind)))))
        elif isinstance(kind, type) and issubclass(kind, spec.Declared):
            fields.append((field.name, _plain(kind), msgspec.field(default_factory=dict)))
        elif field.required:
            fields.append((field.name, kind))
        else:
            default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            fields.append((field.name, kind, _written(default)))
    return msgspec.defstruct(
        section.__name__, fields, namespace={"__doc__": section.__doc__}, kw_only=True,
        forbid_unknown_fields=True, tag_field=config.tag_field, tag=config.tag,
    )  # fmt: skip


def _written(value: Any) -> Any:
    return str(value) if isinstance(value, Bytes | Seconds | Percent | CpuSet) else value


def _quantity_schema(kind: type) -> dict[str, Any]:
    if issubclass(kind, Bytes):
        return {"type": ["string", "integer"], "examples": ["700M", "2G"]}
    if issubclass(kind, Seconds):
        return {"type": ["string", "number"], "examples": ["10m", "30s"]}
    if issubclass(kind, Percent):
        return {"type": "string", "examples": ["150%"]}
    if issubclass(kind, CpuSet):
        return {"type": "string", "examples": ["0-3,8"]}
    raise NotImplementedError(f"no schema for {kind}")


# -- docs/architecture.md ---------------------------------------------------------------------------------------


def lifecycle_table() -> str:
    """A row a state: what it means, and where each trigger leads."""
    comments = _comments_of_states()
    lines = ["| state | process | meaning | leads to |", "|---|---|---|---|"]
    for state, row in lifecycle.TABLE.items():
        targets: dict[str, list[str]] = {}
        for trigger, (target, _) in row.items():
            if target is not state:
                targets.setdefault(target.value, []).append(trigger.value.replace("_", " "))
        ways = "; ".join(f"`{target}`: {', '.join(triggers)}" for target, triggers in targets.items())
        process = "yes" if state in lifecycle.ALIVE else "no"
        lines.append(f"| `{state.value}` | {process} | {comments[state.value]} | {ways} |")
    return "\n".join(lines)


def _comments_of_states() -> dict[str, str]:
    """The comment after each member of `State`: it is the declaration of what a state means."""
    source = Path(lifecycle.__file__).read_text()
    members = source.partition("class State(")[2].partition("\n\n\n")[0]
    return dict(re.findall(r'^ +[A-Z]+ = "(\w+)"  # (.+)$', members, re.MULTILINE))


def architecture_document() -> str:
    """The page as it is, with its generated part written again."""
    page = (DOCS / "architecture.md").read_text()
    start, end = "<!-- The table is generated by `make docs`. -->\n", "<!-- End of the table. -->"
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    if not after:
        raise ValueError(f"docs/architecture.md has lost its marks {start!r} and {end!r}")
    return f"{before}{start}\n{lifecycle_table()}\n\n{end}{after}"


# -- all of them ------------------------------------------------------------------------------------------------

GENERATED: Final = {
    "models.md": models_document,
    "model.schema.json": model_schema,
    "settings.md": settings_document,
    "architecture.md": architecture_document,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated documents again.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a document is stale")
    check = parser.parse_args().check
    stale = 0
    for name, render in GENERATED.items():
        path, text = DOCS / name, render()
        if path.exists() and path.read_text() == text:
            continue
        if check:
            print(f"docs/{name} is stale: run `{REGENERATE}`", file=sys.stderr)
            stale = 1
        else:
            path.write_text(text)
            print(f"docs/{name} written")
    return stale


if __name__ == "__main__":
    sys.exit(main())
