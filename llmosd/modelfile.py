"""Model files: TOML in, `ModelSpec` out, or an error that says how to mend the file. And the directory they live in."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from llmosd.declared import DeclarationError, read_toml
from llmosd.kernel.spec import KERNEL_LIMITS, Limits, ModelSpec
from llmosd.kernel.units import decode_quantity

#: Names that the daemon keeps for its own services.
RESERVED = frozenset({"gateway"})


def parse(text: str, file: str) -> ModelSpec:
    """The model that a file's text describes. Raises DeclarationError."""
    spec = read_toml(text, ModelSpec, file)
    for problem in _problems(spec):
        raise DeclarationError(f"{file}: {problem}")
    return spec


def _problems(spec: ModelSpec) -> list[str]:
    """What is wrong with a file though each key is right."""
    problems = []
    if spec.model in RESERVED:
        problems.append(f"model: the name {spec.model!r} is kept for llmosd's own service")
    if spec.scale.max < spec.scale.min:
        problems.append(f"scale.max: {spec.scale.max} is less than scale.min, {spec.scale.min}")
    if spec.resources.gpu_memory and not spec.resources.gpus:
        problems.append("resources.gpus: gpu_memory is asked for, on no GPU")
    limits = spec.limits
    if limits.memory_max is not None and limits.memory_high is not None and limits.memory_high > limits.memory_max:
        problems.append("limits.memory_high: is over memory_max")
    problems += [
        f"engine.env: {name!r} cannot be in an environment"
        for name, value in spec.engine.env.items()
        if not name or "=" in name or "\0" in name + value
    ]
    if spec.aliases and spec.model in spec.aliases:
        problems.append(f"aliases: {spec.model!r} is the model's own name")
    return problems


def parse_limits(changes: dict[str, str]) -> dict[str, object]:
    """What `llmos limits NAME name=value…` asks for, by name; an empty value means the default (None here).

    Raises DeclarationError.
    """
    known = {field.name: field.type for field in msgspec.structs.fields(Limits)}
    parsed: dict[str, object] = {}
    for name, text in changes.items():
        if name not in known:
            # Through the same road as a file, for the same words.
            read_toml(f"{name} = 0" if name.isidentifier() else "unknown = 0", Limits, "limits")
            raise DeclarationError(f"limits: unknown limit {name!r}")
        if text == "" and name not in KERNEL_LIMITS:
            parsed[name] = None
        elif text == "":
            parsed[name] = getattr(Limits(), name)
        else:
            parsed[name] = _parse_value(name, text)
    return parsed


def _parse_value(name: str, text: str) -> object:
    value: object = int(text) if text.lstrip("-").isdigit() and len(text) < 20 else text
    try:
        return getattr(msgspec.convert({name: value}, Limits, dec_hook=decode_quantity), name)
    except msgspec.ValidationError as error:
        message = str(error).partition(" - at `$")[0]
        raise DeclarationError(f"limits: {name}: {message[:1].lower() + message[1:]}") from None


class ModelDirectory:
    """The model files of one directory, an own one a model."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_all(self) -> tuple[dict[str, tuple[ModelSpec, Path]], list[str]]:
        """(models by name, what is wrong with the files that cannot be used)."""
        models: dict[str, tuple[ModelSpec, Path]] = {}
        refused = []
        for path in sorted(self.path.glob("*.toml")):
            try:
                spec = parse(path.read_text(), str(path))
            except (OSError, UnicodeDecodeError) as error:
                refused.append(f"{path}: cannot be read: {error}")
                continue
            except DeclarationError as error:
                refused.append(str(error))
                continue
            if spec.model in models:
                refused.append(f"{path}: model {spec.model!r} is declared in {models[spec.model][1]} already")
            else:
                models[spec.model] = (spec, path)
        return models, refused

    def keep(self, spec: ModelSpec, text: str) -> Path:
        """Write a model's file, whole or not at all. Raises OSError."""
        known, _ = self.read_all()
        path = known[spec.model][1] if spec.model in known else self.path / f"{spec.model}.toml"
        self.path.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(text)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
        return path

    def remove(self, name: str) -> bool:
        """Delete a model's file. False: there is none. Raises OSError."""
        known, _ = self.read_all()
        if name not in known:
            return False
        known[name][1].unlink()
        return True
