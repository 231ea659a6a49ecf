"""Programs that the daemon runs for itself, for a moment: its own successor's check, systemctl.

Never by fork: subprocess uses vfork or posix_spawn where nothing is to be done in the child, as here (its
documentation, "close_fds"), which gRPC's threads do not mind.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


def run(command: Sequence[str], known: set[int], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and return what it wrote. Blocks.

    `known`: where its pid is noted, so that the node takes it for nobody's orphan. Raises OSError, TimeoutExpired.
    """
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=null, stdout=pipe, stderr=pipe, text=True) as process:
        known.add(process.pid)
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            process.wait()
            known.discard(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)
