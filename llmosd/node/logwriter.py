"""The daemon's side of the log writer: where the stdout and stderr of every worker go.

Finds the log writer of an earlier daemon or starts one, and starts another when it dies. What happens to it, and what
then becomes of a worker that prints, is told in `llmosd.logs.writer`. Nothing here ends or delays a worker for longer
than ANSWER_S because of its log.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from llmosd.launch.gate import Gate, Order, SetUpError
from llmosd.launch.reap import reap
from llmosd.logs import writer
from llmosd.node.output import Output

#: Where journald takes messages, sd_journal_print(3).
JOURNAL: Final = Path("/run/systemd/journal/socket")
#: Seconds in which the log writer answers, unless its disk stands still.
ANSWER_S: Final = 10.0
#: Seconds between two starts of a log writer that dies.
RESTART_S: Final = 1.0
#: Seconds that the log writer has to end once it is not needed.
END_S: Final = 2.0
_LISTENER_FD: Final = 4


class LogWriter:
    """See the module. `warn` tells people."""

    def __init__(
        self, directory: Path, socket_path: Path, max_bytes: int, *, to_journal: bool, warn: Callable[[str], None],
        journal: Path = JOURNAL,
    ) -> None:  # fmt: skip
        self.directory = directory
        #: Those whose pipes the log writer must read.
        self.outputs: set[Output] = set()
        self.pid = 0
        #: Puts the process of this number where it may outlive the daemon. Blocks, raises OSError.
        self.set_apart: Callable[[int], None] = lambda pid: None
        self._path = socket_path
        self._max_bytes = max_bytes
        self._to_journal = to_journal
        self._journal = journal
        self._warn = warn
        self._connection: socket.socket | None = None
        self._pidfd = -1
        self._lock = asyncio.Lock()
        self._answer: asyncio.Future[tuple[dict[str, Any], list[int]]] | None = None
        self._counts: dict[str, int] = {}
        self._counted_before: dict[str, int] = {}
        self._stuck = False
        self._started_at = -RESTART_S
        self._tasks: set[asyncio.Task[None]] = set()

    def log_file(self, worker: str) -> Path:
        return self.directory / f"{worker}.log"

    def output(self, worker: str, model: str) -> Output:
        """For a life of a worker."""
        log = {
            "path": str(self.log_file(worker)),
            "max_bytes": self._max_bytes,
            "worker": worker,
            "model": model,
            "journal": self._to_journal,
        }
        return Output(self, log)

    def counts(self) -> dict[str, int]:
        def total(name: str) -> int:
            return self._counts.get(name, 0) + self._counted_before.get(name, 0)

        counts = {"log_lines_dropped": total("dropped")}
        return counts | {"journal_lines_dropped": total("not_in_journal")} if self._to_journal else counts

    async def close(self) -> None:
        """Let go of it. It goes on while it has pipes to read, else it ends, and that is waited for."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._connection is not None:
            self._disconnect()
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            if not self.outputs:
                await asyncio.to_thread(_wait_ended, self._pidfd, END_S)
            self._on_exit()
        # One that was killed has left its socket; one that reads a dead worker's pipe to its end has not.
        if (found := self._found()) is None:
            self._path.unlink(missing_ok=True)
        else:
            found.close()

    # -- messages -------------------------------------------------------------------------------------------

    async def take(self, output: Output) -> bool:
        """Have a pipe read. False: the log writer does not know it, and there is no descriptor to give it."""
        answer = await self.call("take", [output.read_end] if output.read_end >= 0 else [], log=output.log,
                                 inode=output.inode, output=output)  # fmt: skip
        if answer["known"]:
            self.outputs.add(output)
        return bool(answer["known"])

    async def call(
        self, do: str, fds: Sequence[int] = (), *, output: Output | None = None, **told: Any
    ) -> dict[str, Any]:
        """Tell the log writer something and return its answer. A descriptor in it becomes `output`'s. Raises OSError.

        One that died is started again and told once more: nothing of what it is told does harm twice.
        """
        async with self._lock:
            for is_last in (False, True):
                try:
                    await self._connect()
                    answer, given = await self._exchange({"do": do, **told}, fds)
                    break
                except ConnectionError:
                    if is_last:
                        raise
            if output is not None and output.read_end < 0 and given:
                output.read_end = given.pop()
            for fd in given:
                os.close(fd)
            if "error" in answer:
                raise OSError(errno.EPROTO, f"the log writer: {answer['error']}")
            return answer

    async def _exchange(self, told: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        if self._connection is None:
            raise ConnectionResetError(errno.ECONNRESET, "the log writer has ended")
        self._answer = asyncio.get_running_loop().create_future()
        try:
            # One at a time, so there is room for it.
            socket.send_fds(self._connection, [json.dumps(told).encode()], fds)
            return await asyncio.wait_for(self._answer, ANSWER_S)
        except TimeoutError:
            self._warn(f"the log writer, pid {self.pid}, has not answered for {ANSWER_S:g} s: it is killed")
            if self._pidfd >= 0:
                self._stuck = True
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._disconnect()
            raise TimeoutError(errno.ETIMEDOUT, "the log writer does not answer") from None
        finally:
            self._answer = None

    def _on_readable(self) -> None:
        connection = self._connection
        assert connection is not None
        try:
            data, given, _, _ = socket.recv_fds(connection, writer.MESSAGE_MAX, 1)
        except BlockingIOError:
            return
        except ConnectionError:
            data, given = b"", []
        if not data:
            self._disconnect()
            if self.outputs:
                self._spawn_task(self._replace())
            return
        for fd in given:
            os.set_inheritable(fd, False)
        answer = json.loads(data)
        if "died" in answer:
            self._warn(f"the log writer failed, and another is started:\n{answer['died']}")
            return
        self._counts = {name: answer[name] for name in ("dropped", "not_in_journal")}
        if "notice" not in answer and self._answer is not None and not self._answer.done():
            self._answer.set_result((answer, given))

    # -- the process ----------------------------------------------------------------------------------------

    async def _replace(self) -> None:
        """Another log writer in the place of the one that died; until it is there, what is printed waits."""
        while self.outputs and self._connection is None:
            try:
                async with self._lock:
                    await self._connect()
            except OSError as error:
                self._warn(f"cannot start a log writer, and try again: {error}")
                await asyncio.sleep(RESTART_S)

    async def _connect(self) -> None:
        """A log writer that reads all pipes it must. Raises OSError."""
        if self._stuck:
            raise TimeoutError(errno.ETIMEDOUT, "the log writer does not answer")
        if self._connection is not None:
            return
        connection = self._found() or await self._started()
        self._connection = connection
        asyncio.get_running_loop().add_reader(connection, self._on_readable)
        if self._pidfd < 0:
            self._watch_peer(connection)
        for output in self.outputs:
            if output.read_end >= 0:
                await self._exchange({"do": "take", "log": output.log, "inode": output.inode}, [output.read_end])

    def _found(self) -> socket.socket | None:
        """The log writer that is there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            connection.connect(str(self._path))
            return connection
        except OSError:
            connection.close()
            return None

    async def _started(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._started_at + RESTART_S - loop.time())
        self._started_at = loop.time()
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen()
            grants = {_LISTENER_FD: listener.fileno()}
            gate = Gate.spawn(stdin=null, stdout=null, stderr=null, grants=grants)
            self._watch(gate.pid, gate.pidfd)
            argv = (sys.executable, "-I", "-S", writer.__file__, str(_LISTENER_FD), str(self._path), str(self._journal))
            try:
                await asyncio.to_thread(self.set_apart, gate.pid)
            except OSError as error:
                self._warn(f"the log writer stays in the daemon's own group: {error}")
            await gate.go(Order(argv=argv, env={}, cwd="/", umask=0o027, keep_fds=(_LISTENER_FD,)))
        except SetUpError as error:
            raise OSError(error.errno, f"cannot start the log writer: {error.step}: {error}") from None
        finally:
            listener.close()
            os.close(null)
        connection = self._found()
        if connection is None:
            raise ConnectionResetError(errno.ECONNRESET, "the log writer has ended")
        return connection

    def _watch(self, pid: int, pidfd: int) -> None:
        if self._pidfd >= 0:
            self._on_exit()
        self.pid, self._pidfd = pid, pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._on_exit)

    def _watch_peer(self, connection: socket.socket) -> None:
        """Who is at the other end: whoever called listen(2) last, unix(7) SO_PEERCRED."""
        pid, _, _ = struct.unpack("=3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            pidfd = os.pidfd_open(pid)
            # Not a stranger with the number of a daemon that died before its log writer listened.
            if os.fsencode(self._path) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                self._watch(pid, pidfd)
            else:
                os.close(pidfd)
        except OSError:
            return  # it has just ended, which its connection tells

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        reap(self._pidfd)
        os.close(self._pidfd)
        self._pidfd, self.pid = -1, 0
        self._counted_before = {name: self._counted_before.get(name, 0) + n for name, n in self._counts.items()}
        self._counts = {}
        if self._stuck:
            self._stuck = False
            self._spawn_task(self._replace())

    def _disconnect(self) -> None:
        assert self._connection is not None
        asyncio.get_running_loop().remove_reader(self._connection)
        self._connection.close()
        self._connection = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError(errno.ECONNRESET, "the log writer has ended"))

    def _spawn_task(self, coroutine: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _wait_ended(pidfd: int, timeout_s: float) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(timeout_s * 1000)
