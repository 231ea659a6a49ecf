"""Quantities as people write them: bytes, seconds, percent, CPU sets. Pure; for model files, settings and limits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

_BYTE_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECOND_UNITS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
#: ASCII: else IGNORECASE takes the Kelvin sign for a K.
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE | re.ASCII)
_SPAN: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|min|m|h|d)?\s*")
_CPUS_MAX: Final = 8192
#: 2**60: what a message carries as a number of 64 bits, and no machine has.
_BYTES_MAX: Final = 1 << 60
_SECONDS_MAX: Final = 100_000 * 86400.0


class Bytes(int):
    """A size: an integer of bytes, or text like ``700M`` with powers of 1024, as systemd reads them."""

    @classmethod
    def parse(cls, value: Any) -> Bytes:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value <= _BYTES_MAX:
                raise ValueError(f"a size is at least 0, and at most 1048576T; got {_shown(value)}")
            return cls(value)
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f"expected a size such as 512M or 2G, got {_shown(value)}")
        size = float(match[1]) * _BYTE_UNITS[match[2].upper()]
        if size > _BYTES_MAX:
            raise ValueError(f"a size is at most 1048576T; got {_shown(value)}")
        return cls(size)

    def __str__(self) -> str:
        for unit in ("T", "G", "M", "K"):
            size = _BYTE_UNITS[unit]
            if self >= size:
                return f"{self / size:.4g}{unit}"
        return f"{int(self)}B"


class Seconds(float):
    """A span of time: a number of seconds, or text like ``10m``, ``1.5h``, ``200ms``."""

    @classmethod
    def parse(cls, value: Any) -> Seconds:
        if isinstance(value, int | float) and not isinstance(value, bool):
            span = float(value) if abs(value) <= _SECONDS_MAX else -1.0
        else:
            match = _SPAN.fullmatch(value) if isinstance(value, str) else None
            if match is None:
                raise ValueError(f"expected a span of time such as 30s, 10m or 200ms, got {_shown(value)}")
            span = float(match[1]) * _SECOND_UNITS[match[2] or "s"]
        if not 0 <= span <= _SECONDS_MAX:
            raise ValueError(f"a span of time is at least 0 and at most 100000d, got {_shown(value)}")
        return cls(span)

    def __str__(self) -> str:
        for unit in ("d", "h", "m"):
            size = _SECOND_UNITS[unit]
            if self >= size and self % size == 0:
                return f"{self / size:g}{unit}"
        return f"{float(self) * 1000:g}ms" if 0 < self < 1 else f"{float(self):g}s"


class Percent(int):
    """A share of one CPU: ``150%`` is one and a half."""

    @classmethod
    def parse(cls, value: Any) -> Percent:
        match = re.fullmatch(r"\s*([0-9]{1,7})\s*%\s*", value) if isinstance(value, str) else None
        if match is None or int(match[1]) == 0:
            raise ValueError(f"expected a percentage of one CPU such as 150%, got {_shown(value)}")
        return cls(match[1])

    def __str__(self) -> str:
        return f"{int(self)}%"


class CpuSet(tuple[int, ...]):
    """CPU numbers, as in ``0-3,8``: sorted, each once."""

    def __new__(cls, cpus: Iterable[int] = ()) -> CpuSet:
        return super().__new__(cls, sorted(set(cpus)))

    @classmethod
    def parse(cls, value: Any) -> CpuSet:
        cpus: set[int] = set()
        if isinstance(value, list):
            # A tuple is what msgspec writes by itself, as a list, without asking `encode_quantity`.
            if 0 < len(value) <= _CPUS_MAX and all(type(cpu) is int and 0 <= cpu < _CPUS_MAX for cpu in value):
                return cls(value)
        elif isinstance(value, str) and value.strip():
            named = 0
            for part in value.split(","):
                match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
                first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
                named += last - first + 1
                # More than there can be: the same ones again and again.
                if first > last or last >= _CPUS_MAX or named > _CPUS_MAX:
                    break
                cpus.update(range(first, last + 1))
            else:
                return cls(cpus)
        raise ValueError(f"expected a set of CPUs such as 0-3,8, got {_shown(value)}")

    def __str__(self) -> str:
        parts: list[str] = []
        start = previous = -2
        for cpu in (*self, -1):
            if cpu == previous + 1:
                previous = cpu
                continue
            if start >= 0:
                parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = previous = cpu
        return ",".join(parts)


def _shown(value: Any) -> str:
    """What was written instead, shortened."""
    text = repr(value) if isinstance(value, str | float) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


#: For msgspec's dec_hook: the types above, read from what TOML or a command line holds.
Quantity = Bytes | Seconds | Percent | CpuSet


def decode_quantity(kind: type, value: Any) -> Any:
    """msgspec's `dec_hook`. Raises ValueError with what was expected."""
    if issubclass(kind, Bytes | Seconds | Percent | CpuSet):
        return kind.parse(value)
    raise NotImplementedError(f"no reader for {kind}")


def encode_quantity(value: Any) -> Any:
    """msgspec's `enc_hook`: what `decode_quantity` reads back."""
    if isinstance(value, CpuSet | Percent):
        return str(value)
    if isinstance(value, Bytes):
        return int(value)
    if isinstance(value, Seconds):
        return float(value)
    raise NotImplementedError(f"no writer for {type(value)}")
