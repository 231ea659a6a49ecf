"""Reading declared data from TOML: every error names the file, the key, what was expected and the nearest known name.

For model files and the daemon's settings. The declarations are msgspec structs; this adds what people need to mend a
file: msgspec says that a key is unknown, here is said which one may have been meant.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
import typing
from typing import Any, TypeVar

import msgspec

from llmosd.kernel.units import decode_quantity

T = TypeVar("T")

#: Far above any honest file.
TEXT_MAX = 1 << 20


class DeclarationError(ValueError):
    """A file that does not say what it should. The text is for the one who wrote it."""


def read_toml(text: str, kind: type[T], file: str) -> T:
    """The struct that a TOML text describes. Raises DeclarationError."""
    if len(text) > TEXT_MAX:
        raise DeclarationError(f"{file}: larger than {TEXT_MAX} bytes")
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise DeclarationError(f"{file}: not valid TOML: {error}") from None
    return convert(data, kind, file)


def convert(data: Any, kind: type[T], file: str) -> T:
    """The struct that decoded data describes. Raises DeclarationError."""
    try:
        return msgspec.convert(data, kind, dec_hook=decode_quantity)
    except (msgspec.ValidationError, OverflowError) as error:
        raise DeclarationError(f"{file}: {_explained(str(error), data, kind)}") from None


def _explained(message: str, data: Any, kind: type) -> str:
    """msgspec's message, with paths as TOML writes keys and with the nearest known name."""
    text, _, path = message.partition(" - at `$")
    keys = re.findall(r"\.([A-Za-z0-9_]+)", path)
    where = ".".join(keys)
    if unknown := re.search(r"unknown field `(.+?)`", text):
        known = _fields_at(kind, data, keys)
        near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(sorted(known))}"
        key = ".".join([*keys, unknown[1]])
        return f"unknown key {key!r}{hint}"
    if missing := re.search(r"missing required field `(.+?)`", text):
        key = ".".join([*keys, missing[1]])
        return f"{key!r} is missing"
    if tag := re.search(r"Invalid value '?(.*?)'?$", text):
        return f"{where}: {tag[1]!r} is not one of {', '.join(_tags(kind, keys))}"
    return f"{where}: {text[:1].lower() + text[1:]}" if where else text


def _fields_at(kind: Any, data: Any, keys: list[str]) -> list[str]:
    """Names that the struct at a path knows. A union is resolved by the tag in the data."""
    for key in keys:
        field = next((f for f in msgspec.structs.fields(kind) if f.encode_name == key), None)
        if field is None:
            return []
        data = data.get(key, {}) if isinstance(data, dict) else {}
        choices = [choice for choice in _structs(field.type) if not _tag_differs(choice, data)]
        if not choices:
            return []
        kind = choices[0]
    names = [f.encode_name for f in msgspec.structs.fields(kind)]
    tag = kind.__struct_config__.tag_field
    return [*names, tag] if tag else names


def _structs(annotation: Any) -> list[Any]:
    """The struct types in an annotation."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union, typing.Annotated):
        return [kind for arg in typing.get_args(annotation) for kind in _structs(arg)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct) else []


def _tag_differs(kind: Any, data: Any) -> bool:
    config = kind.__struct_config__
    return bool(config.tag_field) and isinstance(data, dict) and data.get(config.tag_field) != config.tag


def _tags(kind: Any, keys: list[str]) -> list[str]:
    """The tags of the union at a path whose last key is the tag itself."""
    for key in keys[:-1]:
        field = next(f for f in msgspec.structs.fields(kind) if f.encode_name == key)
        structs = _structs(field.type)
        if len(structs) > 1:
            return sorted(str(choice.__struct_config__.tag) for choice in structs)
        kind = structs[0]
    return []
