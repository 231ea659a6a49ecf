"""Who may do what with a path, by its mode and its POSIX access control list (acl(5)). For workers of other users.

`allow` is how a worker that runs as a user of its own is let in to the bus. Not by the group that owns it: members of
that group may use the control plane, and whoever may use that may run anything as the daemon's user.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Final, NamedTuple

from llmosd.launch.gate import User

READ: Final = 4
WRITE: Final = 2
SEARCH: Final = 1
#: include/uapi/linux/posix_acl_xattr.h
_NAME: Final = "system.posix_acl_access"
_HEADER: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")
_VERSION: Final = 2
_NO_ID: Final = 0xFFFFFFFF
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20


class _Entry(NamedTuple):
    tag: int
    permissions: int
    id: int = _NO_ID


def allow(path: Path, uid: int, permissions: int) -> None:
    """Allow a user these permissions on a path, besides whatever the path allows. Raises OSError."""
    entries = _read(path)
    mask = next((entry.permissions for entry in entries if entry.tag == _MASK), 7)
    before = next((entry for entry in entries if (entry.tag, entry.id) == (_USER, uid)), None)
    if before is not None and before.permissions & mask == permissions:
        return
    # What a chmod has masked since stays denied: only the new entry is to widen the mask.
    kept = [
        entry._replace(permissions=entry.permissions & mask) if entry.tag in (_USER, _GROUP_OBJ, _GROUP) else entry
        for entry in entries
        if entry.tag != _MASK and entry is not before
    ]
    kept.append(_Entry(_USER, permissions, uid))
    union = 0
    for entry in kept:
        union |= entry.permissions if entry.tag in (_USER, _GROUP_OBJ, _GROUP) else 0
    kept.append(_Entry(_MASK, union))
    os.setxattr(path, _NAME, _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in sorted(kept)))


def may(path: Path, user: User, permissions: int) -> bool:
    """Whether the kernel would allow a user these permissions on a path whose parents he may search. Raises OSError."""
    if user.uid == 0:
        return True
    status = path.stat()
    entries = _read(path)
    mask = next((entry.permissions for entry in entries if entry.tag == _MASK), 7)
    groups = {user.gid, *user.groups}
    named = [entry.permissions & mask for entry in entries if (entry.tag, entry.id) == (_USER, user.uid)]
    grouped = [
        entry.permissions & mask
        for entry in entries
        if (entry.tag == _GROUP_OBJ and status.st_gid in groups) or (entry.tag == _GROUP and entry.id in groups)
    ]
    if status.st_uid == user.uid:
        granted = [entry.permissions for entry in entries if entry.tag == _USER_OBJ]
    else:
        granted = named or grouped or [entry.permissions for entry in entries if entry.tag == _OTHER]
    return any(one & permissions == permissions for one in granted)


def closed_parent(path: Path, user: User) -> Path | None:
    """The first directory on the way to a path that a user may not search; None: he gets there. Raises OSError."""
    return next((parent for parent in reversed(path.parents) if not may(parent, user, SEARCH)), None)


def _read(path: Path) -> list[_Entry]:
    """The list of a path; one made of its mode where it has none."""
    try:
        data = os.getxattr(path, _NAME)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        mode = path.stat().st_mode
        return [_Entry(_USER_OBJ, mode >> 6 & 7), _Entry(_GROUP_OBJ, mode >> 3 & 7), _Entry(_OTHER, mode & 7)]
    return [_Entry(*fields) for fields in _ENTRY.iter_unpack(data[_HEADER.size :])]
