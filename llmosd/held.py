"""What operators have stopped, kept for the next life of the daemon: one small file in the runtime directory.

As with `systemctl stop`, it counts until the machine is booted. It decides nothing: the kernel says what to keep.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import msgspec

from llmosd.failpoint import failpoint
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.modelfile import write_whole
from llmosd.node.records import boot_id

log = logging.getLogger("llmosd")

_NONE: Final = on.Held((), ())


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    boot_id: str
    models: tuple[str, ...]
    workers: tuple[str, ...]


class HeldFile:
    """See the module. `path`: in a directory of the daemon's own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, effect: do.KeepHeld) -> None:
        """Write it, whole or not at all. Raises OSError."""
        write_whole(self.path, msgspec.json.encode(_File(boot_id(), effect.models, effect.workers)))
        failpoint("held.kept")

    def read(self) -> on.Held:
        """What an earlier daemon of this boot kept. A file that cannot be read is set aside, and costs what it held."""
        try:
            kept = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except FileNotFoundError:
            return _NONE
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            aside = self.path.with_suffix(".damaged")
            log.error(
                "what operators had stopped cannot be read from %s, so it may be started again: %s; "
                "the file was set aside as %s. `llmos stop NAME` stops it again", self.path, error, aside.name,
            )  # fmt: skip
            self._set_aside(aside)
            return _NONE
        return on.Held(kept.models, kept.workers) if kept.boot_id == boot_id() else _NONE

    def _set_aside(self, aside: Path) -> None:
        try:
            self.path.replace(aside)
        except OSError as error:
            log.error("%s cannot be set aside: %s", self.path, error)
