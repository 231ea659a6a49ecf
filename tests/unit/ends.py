"""The two ends of the bus, and what a test says to them and hears from them. For the tests of the protocol."""

from __future__ import annotations

import itertools

from llmos.protocol import client as c
from llmos.protocol import frames as f
from llmos.protocol import host as h

RID = bytes(15) + b"\x01"
WELCOME = f.Welcome(7, 1 << 20, 8, 1 << 20)


def client() -> c.ClientProtocol:
    ids = itertools.count(1)
    return c.ClientProtocol(b"i" * 16, lambda: next(ids).to_bytes(16, "big"))


def host() -> h.HostProtocol:
    made = h.HostProtocol(b"i" * 16, b"token", 42, 4)
    made.receive(f.encode(f.Kind.WELCOME, b"", WELCOME))
    made.outgoing.clear()
    return made


def said(end: c.ClientProtocol | h.HostProtocol, table: f.Table) -> list[f.Message]:
    """What an end wants to send, taken."""
    messages = [f.decode(table, frames) for frames in end.outgoing]
    end.outgoing.clear()
    return messages


def hear(end: c.ClientProtocol, kind: f.Kind, header: f.Header, *payload: bytes, now: float = 1.0) -> list[c.Event]:
    rid = RID if kind in f.ABOUT_A_REQUEST else b""
    return end.receive(f.encode(kind, rid, header, *payload), now)


def told(end: h.HostProtocol, kind: f.Kind, header: f.Header, *payload: bytes) -> list[h.Command]:
    return end.receive(f.encode(kind, RID, header, *payload))


def run(end: h.HostProtocol, attempt: int = 5, first_seq: int = 0) -> list[h.Command]:
    return told(end, f.Kind.RUN, f.Run(attempt, first_seq, "/v1/completions", True), b"body")
