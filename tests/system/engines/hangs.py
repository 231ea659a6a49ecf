"""A program that gets stuck in the kernel, where no signal reaches it: it waits for a file system that does not answer.

`hangs.py SOCKET DIRECTORY`: mounts a FUSE file system on the directory, hands its other end through the socket to the
test, which is to serve it, and asks for a file. What the server has read and not answered is waited for in D state.
"""

import ctypes
import os
import socket
import sys

path, directory = sys.argv[1:]
fuse = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fuse},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"hangs", directory.encode(), b"fuse", 0, options.encode()) != 0:
    sys.exit(f"cannot mount: {os.strerror(ctypes.get_errno())}")
with socket.socket(socket.AF_UNIX) as server:
    server.connect(path)
    socket.send_fds(server, [b"fuse"], [fuse])
os.close(fuse)
os.open(f"{directory}/file", os.O_RDONLY)
