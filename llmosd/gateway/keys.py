"""API keys: who a request is accounted to. A file with a line a key, ``key`` or ``tenant:key``; `#` begins a remark."""

from __future__ import annotations

import hmac
from pathlib import Path

from llmos.protocol.frames import NAME_CHARS_MAX


class Keys:
    """The keys of one file. No file: everybody is welcome, and accounted to nobody in particular."""

    def __init__(self, path: str) -> None:
        """Raises OSError and ValueError: a gateway that cannot know its keys must not open."""
        self._tenants: dict[bytes, str] = {}
        self.required = bool(path)
        if not path:
            return
        for number, line in enumerate(_lines(path), 1):
            words = line.partition("#")[0].strip()
            if not words:
                continue
            tenant, colon, key = words.rpartition(":")
            if not key or (colon and not tenant):
                raise ValueError(f"{path}, line {number}: expected `key` or `tenant:key`")
            if len(tenant) > NAME_CHARS_MAX:
                raise ValueError(f"{path}, line {number}: a tenant's name has at most {NAME_CHARS_MAX} characters")
            self._tenants[key.strip().encode()] = tenant.strip() or "api"
        if not self._tenants:
            raise ValueError(f"{path} has no key in it: nobody could use the API")

    def tenant(self, authorization: str) -> str | None:
        """The tenant of an Authorization header; None if its key is not one of ours."""
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        found = None
        # Every key is compared, in constant time each: how long it takes tells nothing.
        for key, tenant in self._tenants.items():
            if hmac.compare_digest(key, given.strip().encode("utf-8", "surrogateescape")):
                found = tenant
        return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from None
