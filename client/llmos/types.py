"""What the daemon's answers look like to users of the library: frozen, typed, plain.

Fields are the control plane's (`proto/llmos/v1/control.proto` has their meaning): seconds and bytes unless a name says
otherwise; 0 or empty is not known, or not there. `of` makes one from a message without knowing protobuf, so importing
this loads neither protobuf nor gRPC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import msgspec


def _plain(value: Any) -> Any:
    """A field of a message as Python's own type."""
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon says about one thing."""

    @classmethod
    def of(cls, message: Any) -> Self:
        """From the message of the same name and fields."""
        return cls(**{name: _plain(getattr(message, name)) for name in cls.__struct_fields__})


class Status(Result, frozen=True, kw_only=True):
    """What the daemon is and how it does."""

    version: str
    pid: int
    uptime: float
    #: "running" or "stopping".
    state: str
    user: str
    #: "systemd", "cgroup" or "process".
    confinement: str
    models_directory: str
    runtime_directory: str
    log_directory: str
    bus_address: str
    gateway_url: str
    models: int
    workers: int
    requests_running: int
    requests_waiting: int
    counters: dict[str, int]
    cpu_seconds: float
    memory_bytes: int


class Model(Result, frozen=True, kw_only=True):
    """A model, or a service, and how its workers do."""

    name: str
    aliases: tuple[str, ...]
    kind: str
    driver: str
    routed: bool
    state: str
    why: str
    workers_ready: int
    workers_running: int
    workers_max: int
    workers_min: int
    queue: int
    requests_running: int
    slots: int
    cpus: float
    memory_bytes: int
    gpu_memory_bytes: int
    file: str
    toml: str
    simulated: bool
    requires: tuple[str, ...]


class Worker(Result, frozen=True, kw_only=True):
    """A supervised process tree that serves a model."""

    name: str
    model: str
    kind: str
    driver: str
    pid: int
    engine_pid: int
    state: str
    why: str
    #: Reserved.
    cpus: float
    memory_reserved_bytes: int
    #: Used: percent of one CPU; anonymous and shared memory; all resident memory.
    cpu_percent: float
    memory_bytes: int
    memory_resident_bytes: int
    gpus: tuple[str, ...]
    gpu_memory_bytes: int
    slots: int
    slots_used: int
    queue: int
    restarts: int
    uptime: float
    #: 0 to 1; -1: unknown.
    progress: float
    last_exit: str
    simulated: bool
    processes: int
    threads: int
    #: CPUs of its own, as in "0-1,4"; empty: it shares.
    cpu_set: str


class Request(Result, frozen=True, kw_only=True):
    """A call in flight."""

    id: str
    model: str
    worker: str
    tenant: str
    state: str
    priority: int
    attempt: int
    path: str
    stream: bool
    prompt_tokens: int
    tokens: int
    age: float
    waited: float
    #: Seconds until the first item; 0: it has not come.
    first_item: float
    remaining: float
    connected: bool


class Limit(Result, frozen=True, kw_only=True):
    """A limit: what is asked for, what is in force, and who sees to it."""

    name: str
    configured: str
    in_force: str
    enforced_by: str
    used: str
    meaning: str
    #: The most that was used in this life of the worker.
    peak: str


class WorkerLimits(Result, frozen=True, kw_only=True):
    """The limits of a worker, or of a model for the workers to come (`worker` is empty)."""

    worker: str
    model: str
    limits: tuple[Limit, ...]

    @classmethod
    def of(cls, message: Any) -> Self:
        return cls(worker=message.worker, model=message.model, limits=tuple(map(Limit.of, message.limits)))


class Device(Result, frozen=True, kw_only=True):
    """CPUs, memory, a GPU: sizes in bytes, CPUs in CPUs."""

    kind: str
    id: str
    name: str
    total: float
    reserved: float
    used: float
    workers: tuple[str, ...]
    properties: dict[str, str]


class Devices(Result, frozen=True, kw_only=True):
    """What a node has, and why something could not be counted."""

    node: str
    devices: tuple[Device, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, message: Any) -> Self:
        return cls(node=message.node, devices=tuple(map(Device.of, message.devices)), notes=tuple(message.notes))


class Check(Result, frozen=True, kw_only=True):
    """One thing that this machine can or cannot do."""

    name: str
    #: "ok", "limited" or "missing".
    result: str
    message: str
    advice: str


class Event(Result, frozen=True, kw_only=True):
    """Something that happened. `time` is in seconds since 1970."""

    cursor: int
    time: float
    kind: str
    subject: str
    model: str
    message: str


class Command(Result, frozen=True, kw_only=True):
    """A command was taken on: the workers it concerns, and a word for people."""

    workers: tuple[str, ...]
    message: str


class Reloaded(Result, frozen=True, kw_only=True):
    """What reading models.d again has changed; `refused` has "file: what is wrong with it"."""

    applied: tuple[str, ...]
    removed: tuple[str, ...]
    refused: tuple[str, ...]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a streamed answer. `data` is the engine's event it comes from."""

    text: str
    #: "stop", "length", …, on the last piece; else empty.
    finish_reason: str = ""
    data: dict[str, Any] = {}


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer and what it took. `data` is the engine's answer; empty when it was streamed."""

    text: str
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: The engine reported the counts; otherwise the worker counted.
    tokens_exact: bool = False
    data: dict[str, Any] = {}
