"""TOML read into declared structs, with errors that say which key is wrong and what was expected or meant.

For model files, the daemon's settings and limits on the command line. The declarations are msgspec structs. msgspec
decides what is valid; why something is not is said here, in the words of the one who wrote the file.
"""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect as shapes

from llmosd.kernel.units import decode_quantity

T = TypeVar("T")

#: Far above any honest file, and read fast.
TEXT_MAX: Final = 256 << 10
#: Of a wrong value so much is shown.
_SHOWN_CHARS: Final = 60
#: How alike a name must be to be proposed, see difflib.
_ALIKE: Final = 0.6


class DeclarationError(ValueError):
    """A file that does not say what it should. The text is for the one who wrote it."""


def read_toml(text: str, kind: type[T], file: str) -> T:
    """The struct that a TOML text describes. Raises DeclarationError."""
    if len(text) > TEXT_MAX:
        raise DeclarationError(f"{file}: has {len(text)} characters; at most {TEXT_MAX} are read")
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of some thousand digits
        raise DeclarationError(f"{file}: not valid TOML: {error}") from None
    return convert(data, kind, file)


def convert(data: Any, kind: type[T], file: str) -> T:
    """The struct that decoded data describes. Raises DeclarationError."""
    try:
        return msgspec.convert(data, kind, dec_hook=decode_quantity)
    except (msgspec.ValidationError, OverflowError) as error:
        why = next(_problems(data, kind), None) or str(error)
        raise DeclarationError(f"{file}: {why}") from None


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that was probably meant."""
    wanted = name.lower().replace("-", "_")
    found = difflib.get_close_matches(wanted, {other.replace("-", "_"): other for other in known}, 1, _ALIKE)
    return next((other for other in known if found and other.replace("-", "_") == found[0]), None)


def _problems(data: Any, kind: type) -> Iterator[str]:
    root = shapes.type_info(kind)
    assert isinstance(root, shapes.StructType)
    return _in_struct("", data, root, root)


def _in(path: str, value: Any, shape: shapes.Type, root: shapes.StructType, says: str = "") -> Iterator[str]:
    """What is wrong with the value of a key. `says`: what its text must look like."""
    shape, described = _bare(shape)
    says = says or described
    if isinstance(shape, shapes.StructType):
        yield from _in_struct(path, value, shape, root)
    elif isinstance(shape, shapes.UnionType):
        yield from _in_tagged(path, value, [s for s in shape.types if isinstance(s, shapes.StructType)], root)
    elif isinstance(shape, shapes.VarTupleType | shapes.DictType) and _is(value, shape):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inner = shape.value_type if isinstance(shape, shapes.DictType) else shape.item_type
        if len(value) < (shape.min_length or 0):
            yield f"{path}: expected a list that is not empty"
        for key, item in items:
            yield from _in(f"{path}.{key}" if isinstance(value, dict) else f"{path}[{key}]", item, inner, root)
    elif isinstance(shape, shapes.CustomType):
        try:
            decode_quantity(shape.cls, value)
        except ValueError as error:
            yield f"{path}: {error}"
    elif not _is(value, shape):
        yield f"{path}: expected {_expected(shape)}, got {_shown(value)}"
    elif isinstance(shape, shapes.LiteralType):
        if value not in shape.values:
            yield f"{path}: expected {_one_of(shape.values)}, got {_shown(value)}{_meant(value, shape.values)}"
    else:
        try:
            msgspec.convert(value, _annotation(shape))
        except msgspec.ValidationError:
            expected = says if isinstance(shape, shapes.StrType) and says else _expected(shape)
            yield f"{path}: expected {expected}, got {_shown(value)}"


def _in_struct(path: str, value: Any, shape: shapes.StructType, root: shapes.StructType) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: expected a table, got {_shown(value)}"
        return
    fields = {field.encode_name: field for field in shape.fields}
    known = [*fields, *([shape.tag_field] if shape.tag_field else [])]
    for key, inner in value.items():
        below = f"{path}.{key}" if path else key
        if key in fields:
            yield from _in(below, inner, fields[key].type, root, _pattern_says(shape.cls, fields[key].name))
        elif key not in known:
            yield f"unknown key {below!r}{_hint(key, known, path, root)}"
    for key, field in fields.items():
        if field.required and key not in value:
            yield f"{f'{path}.{key}' if path else key!r} is missing"


def _in_tagged(path: str, value: Any, choices: list[shapes.StructType], root: shapes.StructType) -> Iterator[str]:
    """A table that one of its keys says the kind of: [engine] with its driver."""
    tag_field, tags = choices[0].tag_field, sorted(str(choice.tag) for choice in choices)
    if not isinstance(value, dict):
        yield f"{path}: expected a table with {tag_field!r}, which is {_one_of(tags)}; got {_shown(value)}"
    elif tag_field not in value:
        yield f"'{path}.{tag_field}' is missing; it is {_one_of(tags)}"
    elif value[tag_field] not in tags:
        got = value[tag_field]
        yield f"{path}.{tag_field}: expected {_one_of(tags)}, got {_shown(got)}{_meant(got, tags)}"
    else:
        yield from _in_struct(path, value, next(c for c in choices if c.tag == value[tag_field]), root)


# -- words ---------------------------------------------------------------------------------------------------------


def _hint(key: str, known: list[str], path: str, root: shapes.StructType) -> str:
    """Which key was meant; or where this one belongs."""
    if near := nearest(key, known):
        return f"; did you mean {near!r}?"
    if path and any(field.encode_name == key for field in root.fields):
        return f"; it belongs to the top of the file, above all [tables], not into [{path}]"
    for field in root.fields:
        table, _ = _bare(field.type)
        if isinstance(table, shapes.StructType) and any(inner.encode_name == key for inner in table.fields):
            return f"; did you mean '{field.encode_name}.{key}'?"
    return f"; known here: {', '.join(sorted(known))}"


def _meant(value: Any, known: Sequence[Any]) -> str:
    near = nearest(value, [str(other) for other in known]) if isinstance(value, str) else None
    return f"; did you mean {near!r}?" if near else ""


def _one_of(values: Sequence[Any]) -> str:
    return f"one of {', '.join(map(str, values))}"


def _expected(shape: shapes.Type) -> str:
    if isinstance(shape, shapes.IntType | shapes.FloatType):
        what = "a whole number" if isinstance(shape, shapes.IntType) else "a number"
        if shape.gt is not None:
            return f"{what} above {shape.gt:g}"
        if shape.ge is not None and shape.le is not None:
            return f"{what} from {shape.ge} to {shape.le}"
        return f"{what} of at least {shape.ge:g}" if shape.ge is not None else what
    if isinstance(shape, shapes.LiteralType):
        return _one_of(shape.values)
    if isinstance(shape, shapes.DictType):
        return "a table of texts"
    if isinstance(shape, shapes.VarTupleType):
        return "a list of texts"
    return "true or false" if isinstance(shape, shapes.BoolType) else "text"


def _shown(value: Any) -> str:
    """A value as TOML writes it, shortened."""
    if isinstance(value, dict | list | tuple):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | float) else str(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


# -- shapes --------------------------------------------------------------------------------------------------------


def _bare(shape: shapes.Type) -> tuple[shapes.Type, str]:
    """A shape without its description and without None, and that description."""
    says = ""
    while True:
        if isinstance(shape, shapes.Metadata):
            says = says or str((shape.extra_json_schema or {}).get("description", ""))
            shape = shape.type
        elif isinstance(shape, shapes.UnionType) and any(isinstance(s, shapes.NoneType) for s in shape.types):
            shape = next(s for s in shape.types if not isinstance(s, shapes.NoneType))
        else:
            return shape, says


def _pattern_says(kind: type, field: str) -> str:
    """What stands beside a field's pattern: a description of the field itself would hide it."""
    hint = typing.get_type_hints(kind, include_extras=True)[field]
    metas = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
    return next((meta.description or "" for meta in metas if meta.pattern), "")


def _is(value: Any, shape: shapes.Type) -> bool:
    """Whether a value is of a shape's TOML type."""
    if isinstance(shape, shapes.IntType):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(shape, shapes.FloatType):
        return isinstance(value, int | float) and not isinstance(value, bool)
    kinds: dict[type[shapes.Type], type] = {
        shapes.BoolType: bool,
        shapes.StrType: str,
        shapes.LiteralType: str,
        shapes.VarTupleType: list,
        shapes.DictType: dict,
    }
    return isinstance(value, kinds.get(type(shape), object))


def _annotation(shape: shapes.Type) -> Any:
    """A number's or a text's shape as a type again."""
    if isinstance(shape, shapes.StrType):
        return typing.Annotated[str, msgspec.Meta(pattern=shape.pattern)] if shape.pattern else str
    if isinstance(shape, shapes.IntType | shapes.FloatType):
        number: Any = int if isinstance(shape, shapes.IntType) else float
        bounds = {name: getattr(shape, name) for name in ("gt", "ge", "lt", "le") if getattr(shape, name) is not None}
        return typing.Annotated[number, msgspec.Meta(**bounds)] if bounds else number
    return typing.Any
