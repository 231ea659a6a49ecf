"""Namespaces, mounts and capabilities of an isolated worker: a part of `child`, loaded only where an order asks for it.

Standard library only; it changes the process that calls it, and must never leave a step half done without an error:
the caller then ends. With CAP_SYS_ADMIN the namespaces are made as they are. Without, inside a user namespace in which
the caller keeps its own number, where the kernel allows that to anybody. Needs Linux 5.12 (mount_setattr).

What it does not stop: another process of the same user, outside, may be looked into through /proc, its mounts too.
Workers that must not meet need a user each. Root stays root: what could undo the mounts is taken from it
(`drop_capabilities`), not what root may do to files, unless they are read-only.
"""

import _socket  # what `socket` is made of, without its enums
import ctypes
import errno
import fcntl
import os
import stat
import struct
import warnings  # noqa: F401  # os.execvpe imports it, and in a new user namespace Python itself may be out of reach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: include/uapi/linux/sched.h, mount.h, fcntl.h, prctl.h, capability.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REC = 0x4000
MS_SLAVE = 1 << 19
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NODEV = 4
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 4
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAPABILITY_VERSION_3 = 0x20080522
CAP_SYS_ADMIN = 21
#: The newer system calls have one number on all machines but Alpha.
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_MOUNT_SETATTR = 442
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
#: struct ifreq with its flags.
IFREQ = struct.Struct("16sh22x")

#: What each of these errors means here, and what to do.
ADVICE = {
    errno.EPERM: "run llmosd as root with CAP_SYS_ADMIN, or allow user namespaces to its user",
    errno.ENOSYS: "needs Linux 5.12 or later",
    errno.ENOSPC: "raise the sysctls user.max_user_namespaces, user.max_mnt_namespaces and user.max_net_namespaces",
    errno.EBUSY: "somebody writes there: name a path below which nothing is being written",
}
DEVICE_LINKS = {
    "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


class Refused(OSError):  # noqa: N818  # it is the kernel's answer
    """A step that the kernel refused, as a sentence."""

    def __str__(self) -> str:
        return str(self.strerror)


def call(what: str, function: "Any", *args: "Any") -> int:
    """A call of libc's, or Refused with what was attempted."""
    result = int(function(*args))
    if result < 0:
        raise refused(what, ctypes.get_errno())
    return result


def refused(what: str, number: int) -> Refused:
    advice = ADVICE.get(number)
    return Refused(number, f"cannot {what}: {os.strerror(number)}" + (f"; {advice}" if advice else ""))


def enter(order: "dict[str, Any]") -> None:
    """Make the namespaces that `order` (gate.Namespaces) asks for, and arrange what is seen in them."""
    mounts = bool(order["private"] or order["read_only"] or order["devices"] is not None)
    unshare((CLONE_NEWNS if mounts else 0) | (CLONE_NEWNET if order["private_network"] else 0))
    if order["private_network"]:
        raise_loopback()
    if mounts:
        umask = os.umask(0o022)
        arrange(order)
        os.umask(umask)


def unshare(flags: int) -> None:
    with open("/proc/self/status") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    if effective & 1 << CAP_SYS_ADMIN:
        call("make namespaces", libc.unshare, flags)
        return
    uid, gid = os.geteuid(), os.getegid()
    call("make namespaces without CAP_SYS_ADMIN", libc.unshare, flags | CLONE_NEWUSER)
    # Nobody but itself is in there, so it can become nobody else (user_namespaces(7), "the setgroups file").
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            raise refused(f"write {name} of a user namespace", error.errno or 0) from error


def raise_loopback() -> None:
    try:
        any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        now = fcntl.ioctl(any_socket.fileno(), SIOCGIFFLAGS, IFREQ.pack(b"lo", 0))
        fcntl.ioctl(any_socket.fileno(), SIOCSIFFLAGS, IFREQ.pack(b"lo", IFREQ.unpack(now)[1] | IFF_UP))
        any_socket.close()
    except OSError as error:
        raise refused("raise the loopback of a private network", error.errno or 0) from error


# -- mounts -----------------------------------------------------------------------------------------------------


def arrange(order: "dict[str, Any]") -> None:
    """What stays as it is is taken up first, then the rest is changed, then that is put back over it."""
    # What the machine unmounts goes here too, so that nothing holds a disk; what is changed here stays here.
    call("take the mounts over", libc.mount, b"none", b"/", None, MS_REC | MS_SLAVE, None)
    private, read_only = order["private"], order["read_only"]
    hidden = [path for path, _ in private]
    kept = {path: clone(path) for path in order["readable"] if is_below(path, hidden)}
    for tree in kept.values():
        change(tree, MOUNT_ATTR_RDONLY, "make what a worker runs read-only")
    kept |= {path: clone(path) for path in order["writable"] if is_below(path, [*hidden, *read_only])}
    nodes = {}
    if order["devices"] is not None:
        nodes = {name: clone(f"/dev/{name}") for name in order["devices"] if os.path.exists(f"/dev/{name}")}
        # A device is one wherever its node lies.
        change("/", MOUNT_ATTR_NODEV, "close the devices")
        for tree in kept.values():
            change(tree, MOUNT_ATTR_NODEV, "close the devices")
    for path in sorted(read_only):
        protect(path)
    for path, mode in sorted(private):
        mount_new("tmpfs", path, MS_NOSUID | MS_NODEV, f"mode={mode:o}")
    for path, tree in sorted(kept.items()):
        attach(tree, path)
    if order["devices"] is not None:
        private_devices(nodes)


def protect(path: str) -> None:
    """Read-only, with all that is mounted below."""
    what = f"make {path} read-only"
    if path == "/":
        change("/", MOUNT_ATTR_RDONLY, what)
        return
    tree = clone(path)
    change(tree, MOUNT_ATTR_RDONLY, what)
    attach(tree, path)


def private_devices(nodes: "dict[str, int]") -> None:
    """A /dev with these nodes, and terminals and shared memory of its own."""
    mount_new("tmpfs", "/dev", MS_NOSUID | MS_NOEXEC, "mode=755")
    for name, tree in nodes.items():
        attach(tree, f"/dev/{name}")
    for name, target in DEVICE_LINKS.items():
        os.symlink(target, f"/dev/{name}")
    for name, kind, flags, options in (
        ("shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
        ("pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620"),
    ):
        os.mkdir(f"/dev/{name}", 0o755)
        mount_new(kind, f"/dev/{name}", flags, options)
    change("/dev", MOUNT_ATTR_RDONLY, "make /dev read-only", recursive=False)


def is_below(path: str, roots: "list[str]") -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def clone(path: str) -> int:
    """A copy of the mounts at and below a path, attached nowhere yet."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE
    return call(f"take up {path}", libc.syscall, SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags)


def change(tree: "int | str", attributes: int, what: str, *, recursive: bool = True) -> None:
    """Set attributes of a clone, or of what is mounted at a path."""
    fd, path = (tree, b"") if isinstance(tree, int) else (AT_FDCWD, tree.encode())
    flags = (AT_EMPTY_PATH if isinstance(tree, int) else 0) | (AT_RECURSIVE if recursive else 0)
    # struct mount_attr: set, clear, propagation, user namespace.
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    call(what, libc.syscall, SYS_MOUNT_SETATTR, fd, path, flags, wanted, len(wanted))


def attach(tree: int, path: str) -> None:
    """Mount a clone at a path, which is made where it is missing: under a new file system nothing is there."""
    if not os.path.lexists(path):
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        if stat.S_ISDIR(os.stat(tree).st_mode):
            os.mkdir(path, 0o755)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    target = os.fsencode(path)
    call(f"mount {path}", libc.syscall, SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH)
    os.close(tree)


def mount_new(kind: str, path: str, flags: int, options: str) -> None:
    call(f"mount a {kind} of its own on {path}", libc.mount, b"none", os.fsencode(path), kind.encode(), flags,
         options.encode())  # fmt: skip


# -- capabilities -----------------------------------------------------------------------------------------------


def drop_capabilities(numbers: "list[int]") -> None:
    """Take capabilities from all programs that are run from now on, root's too (capabilities(7), "bounding set")."""
    for number in numbers:
        if libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) < 0 and ctypes.get_errno() != errno.EINVAL:
            # EINVAL: this kernel does not know that one yet, so nobody has it.
            raise refused("drop capabilities", ctypes.get_errno())
    call("drop ambient capabilities", libc.prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    call("read capabilities", libc.capget, header, data)
    sets = list(struct.unpack("=6I", data.raw))
    # Effective, permitted, inheritable of the lower 32, then of the upper. An exec adds to root's what it inherits.
    sets[2] = sets[5] = 0
    call("drop inheritable capabilities", libc.capset, header, struct.pack("=6I", *sets))
