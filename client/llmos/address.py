"""Where the daemon is. For the library and the command.

A daemon is found by its runtime directory: `control.sock` in it is the control plane, `front.sock` the bus. Tried are
`LLMOS_HOST`, then the user's runtime directory, then the system's; the first that has a socket is it, and it alone: a
command meant for one daemon must never reach another because the first was just restarting.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from llmos.errors import DaemonUnreachable

SYSTEM_DIRECTORY: Final = Path("/run/llmosd")
CONTROL: Final = "control.sock"
FRONT: Final = "front.sock"
#: What a Unix socket's path may have in Linux, see unix(7).
PATH_BYTES_MAX: Final = 107


class Address(NamedTuple):
    """One daemon's sockets."""

    runtime_directory: Path

    @property
    def control_path(self) -> Path:
        return self.runtime_directory / CONTROL

    @property
    def control(self) -> str:
        """The control plane, as gRPC writes it."""
        return f"unix:{self.control_path}"

    @property
    def bus(self) -> str:
        """The bus's front socket, as ZeroMQ writes it."""
        return f"ipc://{self.runtime_directory / FRONT}"

    def why_silent(self) -> str:
        """Why nobody answers at the control socket, and what to do, as far as one can see from here."""
        path = self.control_path
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                probe.connect(str(path))
        except FileNotFoundError:
            return f"there is no {path}. Start llmosd."
        except PermissionError:
            return f"you may not open {path}. Ask to be a member of its group, or be its user."
        except ConnectionRefusedError:
            return f"nobody listens at {path}: the daemon there has ended. Start llmosd again."
        except OSError as error:
            return f"{path} cannot be opened: {error}."
        return f"it does not answer at {path}, though somebody listens. Its log may say why."


def find(
    host: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ, uid: int | None = None
) -> Address:
    """The daemon to speak to. `host`: a runtime directory or ``unix://`` and its path; else LLMOS_HOST, else search.

    Raises DaemonUnreachable, which names the places looked at.
    """
    named = os.fspath(host) if host else environ.get("LLMOS_HOST", "")
    if named:
        return _named(named, "--host" if host else "LLMOS_HOST")
    places = candidates(environ, os.getuid() if uid is None else uid)
    reasons = []
    for place in places:
        reason = _unusable(Address(place), os.getuid() if uid is None else uid)
        if not reason:
            return Address(place)
        reasons.append(reason)
    message = f"no llmosd runs here: {'; '.join(reasons)}. Start it with `llmosd`, or set LLMOS_HOST."
    raise DaemonUnreachable(message)


def candidates(environ: Mapping[str, str], uid: int) -> list[Path]:
    """Runtime directories in which a daemon for this user may be, best first."""
    if uid == 0:
        return [SYSTEM_DIRECTORY]
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    user = Path(runtime) / "llmosd" if runtime.startswith("/") else Path(f"/tmp/llmosd-{uid}")
    return [user, SYSTEM_DIRECTORY]


def _named(named: str, origin: str) -> Address:
    path = named.removeprefix("unix://")
    if "://" in path:
        raise DaemonUnreachable(f"{origin} is {named!r}, which is no unix:// address. Give a runtime directory.")
    directory = Path(path)
    if directory.name in (CONTROL, FRONT):
        directory = directory.parent
    address = Address(directory.absolute())
    try:
        address.control_path.stat()
    except OSError:
        message = f"no llmosd runs in {directory}, which {origin} names: {address.why_silent()}"
        raise DaemonUnreachable(message) from None
    return address


def _unusable(address: Address, uid: int) -> str:
    """Why there is no daemon for this user in a directory, or ""."""
    directory = address.runtime_directory
    try:
        owner = directory.stat().st_uid
        address.control_path.stat()
    except FileNotFoundError:
        return f"no {address.control_path}"
    except PermissionError:
        return f"{directory} may not be read by you: be a member of its group"
    except OSError as error:
        return f"{directory}: {error.strerror}"
    # Anybody may make a directory in /tmp: what is not ours or root's is not trusted.
    if owner not in (uid, 0) and directory != SYSTEM_DIRECTORY:
        return f"{directory} belongs to user {owner}"
    if len(os.fsencode(address.control_path)) > PATH_BYTES_MAX:
        return f"{address.control_path} is longer than {PATH_BYTES_MAX} bytes, which no socket's path may be"
    return ""
