"""The log writer: one small process that reads what all workers of a daemon print, and writes their logs.

Run by the daemon as ``python -I -S writer.py FD PATH JOURNAL``: FD is a listening SOCK_SEQPACKET socket, bound to PATH;
JOURNAL is journald's. It never ends while a worker's pipe is open, whatever becomes of the daemon, and ends by itself
once it has neither a pipe nor a daemon. It must never be what a worker waits for in vain, so nothing but the disk may
stop it; a disk that is full costs lines, see `file`.

A message is one datagram of JSON and has one answer; ``log`` describes the worker's log (path, max_bytes, worker,
model, journal). Every answer, and what comes unasked (``notice``), has the counts of lost lines.

- ``take`` (log, inode, perhaps a descriptor): read this pipe. Answer: ``known``, and its descriptor when none came.
  What is read already is not read twice.
- ``say`` (log, text): a line of llmosd's own.
- ``end`` (log, text): all that was printed until now is written, then the line. Answer: ``last``, the last line
  that was the worker's own.

Who dies, and what becomes of a worker that prints:

- the daemon: nothing; the next daemon finds this process by PATH and asks it for the pipes.
- this process: the daemon has a descriptor of each pipe too, starts another and hands them over. What is printed
  meanwhile waits in the pipe, 64 KiB, and then the worker does.
- both at once: a worker's own stdout is open for reading too, so no pipe is ever without a reader: no SIGPIPE. A pipe
  that is full makes a command wait; a host drops its engine's lines and counts them. The next daemon reopens the pipe
  from the worker's descriptors (/proc/PID/fd) and starts another log writer.
- the disk: a full one costs lines, which are counted. One that does not answer is as if this process stood still.
"""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import sys
import time
import traceback

sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from llmosd.logs.file import Drops, LogFile
from llmosd.logs.journal import Journal, JournalLines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MESSAGE_MAX = 64 << 10
READ_BYTES = 64 << 10
#: Reads that empty a pipe which somebody goes on filling: it holds 64 KiB, or 1 MiB at most for an ordinary user.
LAST_READS = 32
#: What is kept of a worker's output, to tell its last line.
TAIL_BYTES = 4096
#: Seconds between two tries to say what was dropped.
SETTLE_S = 1.0
#: Seconds in which the daemon that started it must have come.
ALONE_S = 10.0


class Log:
    """One worker's log, over its lives."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        #: How many pipes lead to it: a life has one.
        self.pipes = 0
        self.ended = False
        self.tail = b""
        self.lines: JournalLines | None = None

    def take(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-TAIL_BYTES:] if len(data) < TAIL_BYTES else data[-TAIL_BYTES:]
        self.file.write(data)
        if self.lines is not None:
            self.lines.take(data, time.monotonic())

    def say(self, text: str) -> None:
        self.file.say(text)
        if self.lines is not None:
            self.lines.end()
            self.lines.take(f"llmosd: {text}\n".encode(), time.monotonic())

    def last_line(self) -> str:
        lines = [line for line in self.tail.splitlines() if line.strip() and not line.startswith(b"llmosd: ")]
        return lines[-1].decode(errors="replace").strip() if lines else ""

    @property
    def is_unsettled(self) -> bool:
        return bool(self.file.unsaid or (self.lines is not None and self.lines.unsaid))


class Pipe:
    """One life's stdout and stderr."""

    def __init__(self, log: Log, inode: int) -> None:
        self.log = log
        self.inode = inode


class Writer:
    """See the module."""

    def __init__(self, listener: socket.socket, path: str, journal: str) -> None:
        self._listener = listener
        self._path = path
        self._journal = Journal(journal)
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)
        self._logs: dict[str, Log] = {}
        self._pipes: dict[int, Pipe] = {}
        self.connections: dict[int, socket.socket] = {}
        self._drops = Drops()
        #: Logs that have something to say of what was dropped.
        self._unsettled: set[Log] = set()
        self._told = self._counts()

    def run(self) -> None:
        """Until there is neither a pipe nor a daemon."""
        settle_at = 0.0
        ready = self._epoll.poll(ALONE_S)
        while ready or self._pipes or self.connections:
            for fd, _ in ready:
                if fd in self._pipes:
                    self._read(fd)
                elif fd in self.connections:
                    self._serve(fd)
                elif fd == self._listener.fileno():
                    self._accept()
            if not self._pipes and not self.connections:
                break
            now = time.monotonic()
            if self._is_unsettled() and now >= settle_at:
                self._settle(now)
                settle_at = now + SETTLE_S
            ready = self._epoll.poll(max(0.0, settle_at - now) if self._is_unsettled() else None)
        # The path first: once nobody listens on it another log writer may take it.
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass  # the daemon was quicker
        self._listener.close()

    def _is_unsettled(self) -> bool:
        return bool(self._unsettled) or self._counts() != self._told

    def _settle(self, now: float) -> None:
        """Say what was dropped, in the logs that it was dropped from and to the daemon."""
        for log in list(self._unsettled):
            log.file.settle()
            if log.lines is not None:
                log.lines.settle(now)
            if not log.is_unsettled:
                self._unsettled.discard(log)
        if self._counts() != self._told:
            self._told = self._counts()
            notice = json.dumps({"notice": True} | self._told).encode()
            for connection in self.connections.values():
                try:
                    connection.send(notice)
                except OSError:
                    continue  # it has them with its next answer

    # -- workers ----------------------------------------------------------------------------------------------

    def _read(self, fd: int) -> bool:
        """Once, so that one that prints without end leaves the others their turn. False: there was nothing."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        pipe = self._pipes[fd]
        if data:
            pipe.log.take(data)
            if pipe.log.is_unsettled:
                self._unsettled.add(pipe.log)
            return True
        self._epoll.unregister(fd)
        os.close(fd)
        del self._pipes[fd]
        pipe.log.pipes -= 1
        self._close_if_over(pipe.log)
        return False

    def _close_if_over(self, log: Log) -> None:
        """A log is over when nobody can print to it any more and its end was told."""
        if log.pipes or not log.ended:
            return
        if log.lines is not None:
            log.lines.end()
        log.file.settle()
        log.file.close()
        self._unsettled.discard(log)
        self._logs.pop(log.file.path, None)

    def _log(self, told: dict[str, Any]) -> Log:
        """The log that a message is about, as it is described there."""
        log = self._logs.get(told["path"])
        if log is None:
            log = self._logs[told["path"]] = Log(LogFile(told["path"], told["max_bytes"], self._drops))
        log.file.set_cap(told["max_bytes"])
        if not told["journal"]:
            log.lines = None
        elif log.lines is None:
            log.lines = JournalLines(self._journal, told["worker"], told["model"])
        return log

    # -- the daemon -------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self.connections[connection.fileno()] = connection
        self._epoll.register(connection, select.EPOLLIN)

    def _serve(self, fd: int) -> None:
        connection = self.connections[fd]
        given: list[int] = []
        try:
            data, given, _, _ = socket.recv_fds(connection, MESSAGE_MAX, 1)
            if not data:
                raise ConnectionResetError
            for one in given:
                os.set_inheritable(one, False)
            answer, returned = self._answer(json.loads(data), given)
            socket.send_fds(connection, [json.dumps(answer | self._counts()).encode()], returned)
        except BlockingIOError:
            return
        except OSError:
            # Gone; or it does not read its answers, and begins anew.
            self._epoll.unregister(fd)
            del self.connections[fd]
            connection.close()
        finally:
            for one in given:
                os.close(one)

    def _answer(self, told: dict[str, Any], given: list[int]) -> tuple[dict[str, Any], list[int]]:
        """What is done with a message. A descriptor that is kept is taken out of `given`."""
        match told["do"]:
            case "take":
                return self._take(self._log(told["log"]), told["inode"], given)
            case "say":
                log = self._log(told["log"])
                log.say(told["text"])
                return {}, []
            case "end":
                log = self._log(told["log"])
                for fd in [fd for fd, pipe in self._pipes.items() if pipe.log is log]:
                    for _ in range(LAST_READS):
                        if not self._read(fd):
                            break
                last = log.last_line()
                log.say(told["text"])
                log.tail = b""
                log.ended = True
                self._close_if_over(log)
                return {"last": last}, []
        return {"error": f"cannot {told['do']}"}, []

    def _take(self, log: Log, inode: int, given: list[int]) -> tuple[dict[str, Any], list[int]]:
        for fd, pipe in self._pipes.items():
            if pipe.inode == inode:
                return {"known": True}, [] if given else [fd]
        if not given:
            return {"known": False}, []
        fd = given.pop()
        self._pipes[fd] = Pipe(log, inode)
        log.pipes += 1
        log.ended = False
        self._epoll.register(fd, select.EPOLLIN)
        return {"known": True}, []

    def _counts(self) -> dict[str, int]:
        return {"dropped": self._drops.lines, "not_in_journal": self._journal.dropped}


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    # The daemon has done so already; once more, so that SO_PEERCRED names this process to who connects.
    listener.listen()
    # A worker takes two descriptors, its pipe's and its file's.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    writer = Writer(listener, sys.argv[2], sys.argv[3])
    try:
        writer.run()
    except Exception:
        # It has no other voice, and the daemon starts another.
        told = json.dumps({"notice": True, "died": traceback.format_exc()}).encode()
        for connection in writer.connections.values():
            connection.send(told)
        raise


if __name__ == "__main__":
    main()
