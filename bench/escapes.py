"""A worker that does all it can not to be stopped: `escapes.py FIFO`, a program of its own.

It ignores SIGTERM, and keeps a child that ignores it too, another as soon as one dies. A second keeper of such a child
has detached itself, by a double fork and a session of its own. Each of the four writes its pid as it begins. All carry
the FIFO's path in their arguments, by which the benchmark finds who is left, and ends them.
"""

import os
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hello()
    between = os.fork()
    if between == 0:
        os.setsid()
        if os.fork() == 0:
            hello()
            keep()
        os._exit(0)
    os.waitpid(between, 0)
    keep()


def keep() -> None:
    while True:
        child = os.fork()
        if child == 0:
            hello()
            while True:
                signal.pause()
        os.waitpid(child, 0)


def hello() -> None:
    fd = os.open(sys.argv[1], os.O_WRONLY)
    os.write(fd, b"%d\n" % os.getpid())
    os.close(fd)


main()
