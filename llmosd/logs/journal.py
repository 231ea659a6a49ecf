"""Lines for systemd's journal, with fields, in its own protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL). Never blocks.

For the log writer, which has no site-packages: systemd-python is not at hand there, and its `send` would wait for a
journald that stands still. journald limits the rate of a unit, and all workers' lines come from the daemon's: a worker
that prints without end would silence the others and the daemon. So each has a limit of its own, well below.
"""

from __future__ import annotations

import socket

#: journald's default for a unit is 10,000 messages in 30 s (RateLimitBurst=, journald.conf(5)).
BURST = 2000
INTERVAL_S = 30.0
#: journald's LineMax=: where it cuts a longer line of a service's stdout.
LINE_MAX = 48 << 10
_INFO = 6


class Journal:
    """The way to journald."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        #: Lines that journald did not get.
        self.dropped = 0

    def send(self, fields: bytes, line: bytes) -> None:
        """One entry. A journald that is away, or does not keep up, costs the line."""
        try:
            # By path each time: a journald that was started anew has another socket there.
            self._socket.sendto(b"%bMESSAGE=%b\n" % (fields, line), self._path)
        except OSError:
            self.dropped += 1


class JournalLines:
    """What one worker prints, cut into lines and held to its rate."""

    def __init__(self, journal: Journal, worker: str, model: str) -> None:
        self._journal = journal
        fields = {"PRIORITY": _INFO, "SYSLOG_IDENTIFIER": "llmos", "LLMOS_WORKER": worker, "LLMOS_MODEL": model}
        self._fields = "".join(f"{name}={value}\n" for name, value in fields.items()).encode()
        self._rest = b""
        self._interval_ends = 0.0
        self._sent = 0
        #: Lines above the rate, of which the journal does not know yet.
        self.unsaid = 0

    def take(self, data: bytes, now: float) -> None:
        """`now`: monotonic seconds."""
        self.settle(now)
        if self._sent >= BURST:
            # Not cut into lines: what is above the rate must cost next to nothing.
            self._leave_out(data.count(b"\n"))
            self._rest = data[data.rfind(b"\n") + 1 :][:LINE_MAX] if b"\n" in data else self._rest
            return
        *lines, rest = (self._rest + data).split(b"\n")
        while len(rest) > LINE_MAX:
            lines.append(rest[:LINE_MAX])
            rest = rest[LINE_MAX:]
        self._rest = rest
        for number, line in enumerate(lines):
            if self._sent >= BURST:
                self._leave_out(len(lines) - number)
                break
            if line:
                self._send(line[:LINE_MAX])

    def settle(self, now: float) -> None:
        """Begin a new interval when it is time, with a word on what the last one left out."""
        if now < self._interval_ends:
            return
        self._interval_ends = now + INTERVAL_S
        self._sent = 0
        if self.unsaid:
            text = f"llmosd: {self.unsaid} lines were left out, above {BURST} in {INTERVAL_S:g} s: see the log file"
            self.unsaid = 0
            self._send(text.encode())

    def end(self) -> None:
        """Nothing more comes: what is there is a line."""
        if self._rest and self._sent < BURST:
            self._send(self._rest)
        self._rest = b""

    def _send(self, line: bytes) -> None:
        self._sent += 1
        self._journal.send(self._fields, line)

    def _leave_out(self, lines: int) -> None:
        self.unsaid += lines
        self._journal.dropped += lines
