"""The `python` engine of the router's benchmark: as it is imported, it makes its worker's process the stub worker.

The daemon starts a real worker, holds it at the gate, records and watches it; then that process, with its pid, its
identity and its token, becomes `bench/peers.py worker`. So the daemon routes to a worker like any other, and no worker
host's own cost is measured. It must be imported by nothing but a worker host of this benchmark.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PEERS = str(Path(__file__).with_name("peers.py"))


def generate() -> None:
    """Named by the model file; never called."""


if (back := os.environ.get("BENCH_BACK")) is not None:
    argv = [sys.executable, _PEERS, "worker", back, "--record", os.environ["BENCH_RECORD"]]
    os.execv(sys.executable, argv)
