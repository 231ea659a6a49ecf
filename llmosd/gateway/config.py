"""What the daemon tells a gateway at its birth."""

from __future__ import annotations

import msgspec


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    front_address: str
    runtime_directory: str
    #: Its listening socket; the daemon keeps it open, so that a restart of the gateway refuses nobody.
    listen_fd: int
    api_keys_file: str
    body_max: int
    #: Without a daemon for this long it ends, in seconds.
    orphan_timeout: float
