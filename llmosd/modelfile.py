"""Model files: TOML in, `ModelSpec` out, or an error that says how to mend the file. And the directory they live in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from llmosd.declared import DeclarationError, convert, read_toml
from llmosd.failpoint import failpoint
from llmosd.health import target
from llmosd.kernel.spec import KERNEL_LIMITS, Attached, Command, Limits, Liveness, LlamaCpp, ModelSpec, OpenAI, Ready
from llmosd.kernel.units import encode_quantity

#: Names that the daemon keeps for its own services.
RESERVED: Final = frozenset({"gateway"})
#: Longer ones may take long to compile.
_EXPRESSION_CHARS_MAX: Final = 1000
#: Shorter intervals would be a load of their own.
_INTERVAL_MIN_S: Final = 0.1
_WHOLE: Final = re.compile(r"-?[0-9]{1,19}")


def parse(text: str, file: str) -> ModelSpec:
    """The model that a file's text describes. Raises DeclarationError."""
    spec = read_toml(text, ModelSpec, file)
    for problem in _problems(spec):
        raise DeclarationError(f"{file}: {problem}")
    return spec


def _problems(spec: ModelSpec) -> list[str]:
    """What is wrong with a file though each key is right."""
    problems = []
    # The pattern's `$` also matches before a final line break.
    names = (spec.model, *spec.aliases, *spec.requires)
    problems += [f"{name!r} ends with a line break" for name in names if name.endswith("\n")]
    if _has_nul(msgspec.to_builtins(spec, enc_hook=encode_quantity)):
        problems.append("a text has a NUL character in it, which no argument, path or variable can have")
    problems += [
        f"{key}: the name {name!r} is kept for llmosd's own service"
        for key, name in (("model", spec.model), *(("aliases", alias) for alias in spec.aliases))
        if name in RESERVED
    ]
    if spec.scale.max < spec.scale.min:
        problems.append(f"scale.max: {spec.scale.max} is less than scale.min, {spec.scale.min}")
    if spec.resources.gpu_memory and not spec.resources.gpus:
        problems.append("resources.gpus: gpu_memory is asked for, on no GPU")
    limits, cpus = spec.limits, spec.resources.cpus
    if spec.resources.cpu_placement == "exclusive":
        if cpus < 1 or cpus != int(cpus):
            problems.append(f"resources.cpus: exclusive CPUs are whole ones, at least 1; got {cpus:g}")
        elif limits.allowed_cpus is not None and len(limits.allowed_cpus) < cpus:
            problems.append(f"limits.allowed_cpus: {limits.allowed_cpus} has less than the {cpus:g} exclusive CPUs")
    if limits.memory_max is not None and limits.memory_high is not None and limits.memory_high > limits.memory_max:
        problems.append("limits.memory_high: is over memory_max")
    problems += [
        f"engine.env: {name!r} cannot be in an environment" for name in spec.engine.env if not name or "=" in name
    ]
    if spec.isolation.private_network and isinstance(spec.engine, Attached):
        problems.append("isolation.private_network: an attached engine is somewhere else, and could not be reached")
    problems += [*_ready_problems(spec), *_liveness_problems(spec), *_unreachable(spec)]
    if spec.aliases and spec.model in spec.aliases:
        problems.append(f"aliases: {spec.model!r} is the model's own name")
    return problems


def _ready_problems(spec: ModelSpec) -> Iterator[str]:
    ready, engine = spec.ready, spec.engine
    if ready != Ready() and not isinstance(engine, Command):
        asked = "engine.ready_path" if isinstance(engine, OpenAI | Attached) else "its host"
        yield f"ready: is for driver command; when an engine of driver {engine.driver} is ready, {asked} tells"
    if ready.http:
        yield from _url_problems("ready.http", ready.http)
    if len(ready.log) > _EXPRESSION_CHARS_MAX:
        yield f"ready.log: has {len(ready.log)} characters; at most {_EXPRESSION_CHARS_MAX} are read"
        return
    try:
        re.compile(ready.log)
    except (re.error, OverflowError, RecursionError) as error:
        yield f"ready.log: {ready.log[:60]!r} is not a regular expression: {error}"


def _liveness_problems(spec: ModelSpec) -> Iterator[str]:
    liveness, engine = spec.liveness, spec.engine
    if liveness == Liveness():
        return
    if isinstance(engine, Command):
        if not liveness.http:
            yield "liveness: a command is only asked where liveness.http says what"
    elif not isinstance(engine, LlamaCpp | OpenAI | Attached):
        yield f"liveness: an engine of driver {engine.driver} lives in its host, which timeouts.silence is for"
    elif liveness.http:
        yield f"liveness.http: is for driver command; an engine of driver {engine.driver} is asked where it gets ready"
    if liveness.http:
        yield from _url_problems("liveness.http", liveness.http)
    if 0 < liveness.interval < _INTERVAL_MIN_S:
        yield f"liveness.interval: at least {_INTERVAL_MIN_S * 1000:g}ms, or 0 for never, got {liveness.interval}"
    if not liveness.timeout:
        yield "liveness.timeout: nothing answers in no time"


def _unreachable(spec: ModelSpec) -> Iterator[str]:
    for key, url in (("ready.http", spec.ready.http), ("liveness.http", spec.liveness.http)):
        if url and spec.isolation.private_network:
            yield f"{key}: nobody outside can ask what runs in a private network; ready.log is what can be used"


def _url_problems(key: str, url: str) -> Iterator[str]:
    try:
        target(url)
    except ValueError as error:
        yield f"{key}: {error}"


def _has_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_has_nul(part) for pair in value.items() for part in pair)
    return isinstance(value, list | tuple) and any(map(_has_nul, value))


def parse_limits(changes: dict[str, str]) -> dict[str, object]:
    """What `llmos limits NAME name=value…` asks for, by name; an empty value means the default (None here).

    Raises DeclarationError.
    """
    parsed: dict[str, object] = {}
    for name, text in changes.items():
        if text == "" and name in Limits.__struct_fields__:
            parsed[name] = getattr(Limits(), name) if name in KERNEL_LIMITS else None
        else:
            parsed[name] = getattr(_read_limit(name, text), name)
    return parsed


def _read_limit(name: str, text: str) -> Limits:
    """Through the same door as a file, for the same words. What a file takes as text only comes as such: a CPU's
    number."""
    try:
        return convert({name: text}, Limits, "limits")
    except DeclarationError:
        if not _WHOLE.fullmatch(text):
            raise
        return convert({name: int(text)}, Limits, "limits")


class ModelDirectory:
    """The model files of one directory, an own one a model."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_all(self) -> tuple[dict[str, tuple[ModelSpec, Path]], list[str]]:
        """(models by name, what is wrong with the files that cannot be used)."""
        models: dict[str, tuple[ModelSpec, Path]] = {}
        refused = []
        failpoint("models.read")
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

    def place(self, model: str) -> Path:
        """Where a model's file is, or would be. Raises DeclarationError when another model's file has that name."""
        known, _ = self.read_all()
        if model in known:
            return known[model][1]
        path = self.path / f"{model}.toml"
        if owner := next((name for name, (_, file) in known.items() if file == path), None):
            raise DeclarationError(f"{path} is the file of model {owner!r}: give it another name first")
        return path

    def keep(self, path: Path, text: str) -> None:
        """Write a model's file, whole or not at all. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())

    def remove(self, name: str) -> bool:
        """Delete a model's file. False: there is none. Raises OSError."""
        known, _ = self.read_all()
        if name not in known:
            return False
        known[name][1].unlink()
        return True


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one. Raises OSError."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
