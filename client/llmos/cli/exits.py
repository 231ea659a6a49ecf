"""Exit codes of the command, and which failure has which."""

from __future__ import annotations

from typing import Final

from llmos.errors import DaemonUnreachable, LlmosError, NotFound, Refused

FAILED: Final = 1
USAGE: Final = 2
NO_DAEMON: Final = 3
NO_SUCH_THING: Final = 4
REFUSED: Final = 5
#: As shells write the end by a signal: 128 and SIGINT's number, SIGPIPE's number.
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141

_CODES: Final[tuple[tuple[type[LlmosError], int], ...]] = (
    (DaemonUnreachable, NO_DAEMON),
    (NotFound, NO_SUCH_THING),
    (Refused, REFUSED),
)


def code_of(error: LlmosError) -> int:
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILED)
