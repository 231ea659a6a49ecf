"""An engine for tests that does not want to end: it ignores SIGTERM and keeps two daemons of its own.

Each is forked twice, in a session of its own, with an empty environment, ignores SIGTERM too, and keeps a child that
it starts again as soon as it dies. The engine starts each of them again as well. `stubborn.py PORT` serves /health, so
that it becomes ready; with `keep-environment` after that, the daemons have the engine's environment. Any other word
is there to know them by.
"""

import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

CLEAN = "clean"
KEEP_ENVIRONMENT = "keep-environment"


def keep_child() -> None:
    """A daemon's life: a child that it starts again for as long as it lives."""
    while True:
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        os.waitpid(pid, 0)


def fork_away() -> int:
    """A daemon, forked twice; returns its pid."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if (pid := os.fork()) != 0:
            os.write(write_end, str(pid).encode())
            os._exit(0)
        # A new program image: what marked the old one is gone with its environment.
        env = dict(os.environ) if KEEP_ENVIRONMENT in sys.argv else {}
        os.execve(sys.executable, [sys.executable, "-I", "-S", __file__, CLEAN, *sys.argv[2:]], env)
    os.wait()
    pid = int(os.read(read_end, 20))
    os.close(read_end)
    os.close(write_end)
    return pid


def keep_daemons() -> None:
    while True:
        for index, pid in enumerate(daemons):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                daemons[index] = fork_away()
        time.sleep(0.01)


class Health(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == CLEAN:
    keep_child()
daemons = [fork_away(), fork_away()]
print("forked away", *daemons, flush=True)
threading.Thread(target=keep_daemons, daemon=True).start()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
