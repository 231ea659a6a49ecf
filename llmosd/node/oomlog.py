"""Whom the OOM killer took, by the kernel's own log: exact, and there when the victim's cgroup is gone already.

systemd removes a scope's cgroup, and with it the count of its OOM kills, as soon as the last process has died. Reads
/dev/kmsg (Documentation/ABI/testing/dev-kmsg), which root may. Whoever may not knows nobody: then the count is all
there is.
"""

from __future__ import annotations

import os
import re
import threading
from typing import Final

#: mm/oom_kill.c, __oom_kill_process: "Memory cgroup out of memory: Killed process 779 (python3) total-vm:…".
_KILLED: Final = re.compile(rb"[Oo]ut of memory: Killed process (\d+) \(")
#: A record is at most this long.
_RECORD_MAX: Final = 8192
#: Victims that nobody has asked for, such as processes of others.
_REMEMBERED: Final = 1000


class OomLog:
    """From now on. Calls may come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._victims: dict[int, None] = {}
        try:
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self._fd = -1  # not ours to read, or not there in this container

    def took(self, pid: int) -> bool:
        """Whether a process that has ended was a victim. Asked a second time, it was not: numbers are used again."""
        with self._lock:
            self._read()
            return self._victims.pop(pid, self) is None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> None:
        while self._fd >= 0:
            try:
                record = os.read(self._fd, _RECORD_MAX)
            except BrokenPipeError:
                continue  # older records were overwritten before they were read
            except OSError:
                return  # no further record now
            if (match := _KILLED.search(record)) is not None:
                self._victims[int(match[1])] = None
                if len(self._victims) > _REMEMBERED:
                    del self._victims[next(iter(self._victims))]
