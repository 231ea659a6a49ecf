"""What the daemon tells a worker host at its birth, through a descriptor: it holds secrets, so it is in no environment.

Also how a host tells how its engine ended, through a file: it must outlive both the host and the daemon.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import msgspec

from llmosd.kernel.spec import AnyEngine, Liveness
from llmosd.kernel.units import decode_quantity, encode_quantity
from llmosd.launch.gate import FIRST_GRANT, Order

#: Where a host, or a gateway, finds its configuration.
CONFIG_FD: Final = FIRST_GRANT


class HostConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a host needs to know."""

    worker: str
    model: str
    #: ZeroMQ identity, 16 bytes, and the secret that goes with it.
    identity: bytes
    token: bytes
    back_address: str
    engine: AnyEngine
    liveness: Liveness
    slots: int
    #: Whole CPUs for the engine's threads; at least 1.
    threads: int
    #: How the engine is to be launched; argv and environment are the driver's to fill in.
    engine_order: Order
    #: The host's own directory: the engine's socket is in it. Gone when the worker is.
    scratch: str
    #: Where relative weights are looked for, in this order.
    weights_path: tuple[str, ...]
    #: Seconds an engine has from SIGTERM to SIGKILL.
    stop_timeout: float
    #: Seconds without a daemon after which the host drains and ends.
    orphan_timeout: float

    @property
    def engine_exit_file(self) -> Path:
        return Path(self.scratch) / "engine-exit"


def encode(config: Any) -> bytes:
    """What `read` reads."""
    return msgspec.msgpack.encode(config, enc_hook=encode_quantity)


def read(fd: int = CONFIG_FD) -> HostConfig:
    """The configuration that came through `fd`, which is closed."""
    with os.fdopen(fd, "rb") as file:
        return msgspec.msgpack.decode(file.read(), type=HostConfig, dec_hook=decode_quantity)
