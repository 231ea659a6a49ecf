"""llmos: the client library of llmosd, an operating system for model workers.

>>> import llmos
>>> client = llmos.Client()
>>> for piece in client.run("gemma3-270m", "The capital of France is", stream=True):
...     print(piece.text, end="")

Names load what they need when they are first used (PEP 562): importing `llmos.protocol` never loads gRPC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmos.aio import AsyncClient as AsyncClient
    from llmos.client import Client as Client
    from llmos.errors import LlmosError as LlmosError

__all__ = ["AsyncClient", "Client", "LlmosError"]

_HOMES = {"AsyncClient": "llmos.aio", "Client": "llmos.client", "LlmosError": "llmos.errors"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'llmos' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
