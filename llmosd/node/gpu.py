"""GPUs, as NVML reports them: the one file that speaks to it. For the inventory and the doctor.

Nothing here raises because of NVML: a library that is missing, an initialisation that fails, a call that a GPU does not
support becomes a note in plain words, and what can be read still is. A machine without a GPU is a normal machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

#: pynvml brings no types; this is that module, or a model of it in a test.
Nvml = Any


class Slice(msgspec.Struct, frozen=True):
    """A MIG device: a part of a GPU that is granted like a GPU of its own."""

    uuid: str
    name: str
    memory_bytes: int
    memory_used_bytes: int


class GpuDevice(msgspec.Struct, frozen=True):
    """A GPU. Memory is what programs can use: the driver's reserve is taken off."""

    uuid: str
    name: str
    pci_bus_id: str
    memory_bytes: int
    memory_used_bytes: int
    mig_enabled: bool = False
    slices: tuple[Slice, ...] = ()


class Gpus(msgspec.Struct, frozen=True):
    """Every GPU of the machine, the driver's version, and why something is missing."""

    driver_version: str = ""
    devices: tuple[GpuDevice, ...] = ()
    notes: tuple[str, ...] = ()


def take_gpus() -> Gpus:
    """The GPUs of this machine. May block while the driver loads."""
    try:
        nvml: Nvml = importlib.import_module("pynvml")
    except ImportError as error:
        return Gpus(notes=(f"NVML: its Python binding cannot be imported ({error}); install nvidia-ml-py",))
    return read_gpus(nvml)


def read_gpus(nvml: Nvml) -> Gpus:
    """What `nvml`, the pynvml module, tells about the GPUs."""
    notes: list[str] = []
    with _session(nvml, notes) as started:
        if not started:
            return Gpus(notes=tuple(notes))
        ask = _Asker(nvml, notes)
        driver = ask("the driver's version", "", nvml.nvmlSystemGetDriverVersion)
        count = ask("the number of GPUs", 0, nvml.nvmlDeviceGetCount)
        devices = [device for index in range(count) if (device := _device(nvml, ask, index)) is not None]
    return Gpus(driver, tuple(devices), tuple(notes))


def gpu_memory_by_pid() -> dict[int, int]:
    """GPU memory in bytes that each process holds, on all GPUs. Empty where NVML cannot tell.

    Process ids are those of the machine: in a container with process ids of its own they do not match.
    """
    try:
        nvml: Nvml = importlib.import_module("pynvml")
    except ImportError:
        return {}  # take_gpus says so
    return read_memory_by_pid(nvml)


def read_memory_by_pid(nvml: Nvml) -> dict[int, int]:
    """`gpu_memory_by_pid` over a given pynvml module."""
    used: dict[int, int] = {}
    notes: list[str] = []  # take_gpus reports the same troubles
    with _session(nvml, notes) as started:
        ask = _Asker(nvml, notes)
        for index in range(ask("the number of GPUs", 0, nvml.nvmlDeviceGetCount) if started else 0):
            handle = ask(f"GPU {index}", None, nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                continue
            for process in ask(f"GPU {index}: processes", (), nvml.nvmlDeviceGetComputeRunningProcesses, handle):
                # None: the driver does not tell
                used[process.pid] = used.get(process.pid, 0) + (process.usedGpuMemory or 0)
    return used


@contextmanager
def _session(nvml: Nvml, notes: list[str]) -> Iterator[bool]:
    """NVML initialised, or False with the reason noted."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        notes.append(f"NVML: {str(error).removeprefix('NVML ')}")
        yield False
        return
    try:
        yield True
    finally:
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            notes.append(f"NVML: shutting down: {error}")


class _Asker:
    """Calls NVML; an error becomes a note and the given default."""

    def __init__(self, nvml: Nvml, notes: list[str]) -> None:
        self._nvml = nvml
        self._notes = notes

    def __call__(self, what: str, default: Any, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except (self._nvml.NVMLError, UnicodeDecodeError) as error:
            self.note(f"{what}: {error}")
            return default

    def note(self, text: str) -> None:
        self._notes.append(f"NVML: {text}")


def _device(nvml: Nvml, ask: _Asker, index: int) -> GpuDevice | None:
    """The GPU with this index, or None: one without a UUID cannot be granted."""
    handle = ask(f"GPU {index}", None, nvml.nvmlDeviceGetHandleByIndex, index)
    uuid = ask(f"GPU {index}: UUID", "", nvml.nvmlDeviceGetUUID, handle) if handle is not None else ""
    if not uuid:
        return None
    total, used = _memory(nvml, ask, handle, uuid)
    enabled = _mig_enabled(nvml, ask, handle, uuid)
    pci = ask(f"{uuid}: PCI address", None, nvml.nvmlDeviceGetPciInfo, handle)
    return GpuDevice(
        uuid=uuid,
        name=ask(f"{uuid}: name", "", nvml.nvmlDeviceGetName, handle),
        pci_bus_id=_text(pci.busId) if pci is not None else "",
        memory_bytes=total,
        memory_used_bytes=used,
        mig_enabled=enabled,
        slices=_slices(nvml, ask, handle, uuid) if enabled else (),
    )


def _mig_enabled(nvml: Nvml, ask: _Asker, handle: Any, uuid: str) -> bool:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError_NotSupported:
        return False  # most GPUs know no MIG: nothing to note
    except nvml.NVMLError as error:
        ask.note(f"{uuid}: MIG mode: {error}")
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _slices(nvml: Nvml, ask: _Asker, handle: Any, gpu: str) -> tuple[Slice, ...]:
    """The MIG devices of a GPU. Their numbers have gaps: one that is free answers "not found"."""
    found: list[Slice] = []
    for index in range(ask(f"{gpu}: MIG devices", 0, nvml.nvmlDeviceGetMaxMigDeviceCount, handle)):
        try:
            mig = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except nvml.NVMLError_NotFound:
            continue
        except nvml.NVMLError as error:
            ask.note(f"{gpu}: MIG device {index}: {error}")
            continue
        uuid = ask(f"{gpu}: MIG device {index}: UUID", "", nvml.nvmlDeviceGetUUID, mig)
        if uuid:
            total, used = _memory(nvml, ask, mig, uuid)
            found.append(Slice(uuid, ask(f"{uuid}: name", "", nvml.nvmlDeviceGetName, mig), total, used))
    return tuple(found)


def _memory(nvml: Nvml, ask: _Asker, handle: Any, uuid: str) -> tuple[int, int]:
    """(usable, used) in bytes. Version 2 of the call tells the driver's reserve apart; drivers before 510 lack it."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2)
        # Not `used`: whether it includes the reserve differs between drivers.
        usable = memory.total - memory.reserved
        return usable, max(0, usable - memory.free)
    except nvml.NVMLError:
        # GPUs that share the machine's RAM refuse this one too: it is noted, and nothing can be reserved on them.
        memory = ask(f"{uuid}: memory", None, nvml.nvmlDeviceGetMemoryInfo, handle)
        return (memory.total, memory.used) if memory is not None else (0, 0)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
