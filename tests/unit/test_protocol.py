"""Both ends of the bus against each other: whatever the pipe does, an answer arrives whole, once and in order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.protocol import client as c
from llmos.protocol import frames as f
from llmos.protocol import host as h
from tests.unit.ends import RID, client, host, run, said, told


@pytest.mark.parametrize("size", [1, 10_000, 900_000, h.WINDOW_BYTES, 3 * h.WINDOW_BYTES])
def test_items_of_any_size_reach_a_reader_that_keeps_taking(size: int) -> None:
    reader, writer = client(), host()
    writer.receive(f.encode(f.Kind.WELCOME, b"", f.Welcome(7, 1 << 20, 8, 1 << 30)))
    reader.submit(f.Submit("m", "/", True), b"body", 0.0)
    run(writer)
    for number in range(12):
        writer.item(RID, 5, b"x" * (size if number % 2 else 200_000))
    taken = 0
    for _ in range(200):
        writer.flush(1.0)
        for frames in writer.outgoing:
            for event in reader.receive(frames, 1.0):
                if isinstance(event, c.Items):
                    taken += len(event.items)
                    reader.consumed(RID, len(event.items))
        writer.outgoing.clear()
        for message in said(reader, f.CLIENT_TO_DAEMON):
            if message.kind is f.Kind.ACK:
                told(writer, f.Kind.ACK, message.header)
    assert taken == 12


@settings(max_examples=60)
@given(st.integers(), st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.4]), st.integers(1, 9))
def test_an_answer_arrives_whole_over_a_pipe_that_loses_and_repeats(
    seed: int, length: int, loss: float, window: int
) -> None:
    chance = random.Random(seed)
    reader, writer = client(), host()
    welcome = f.encode(f.Kind.WELCOME, b"", f.Welcome(7, 1 << 20, window, 1 << 20))
    writer.receive(welcome)
    reader.receive(welcome, 0.0)
    reader.submit(f.Submit("m", "/", True), b"body", 0.0)
    run(writer)
    got: list[bytes] = []
    ended = 0
    for step in range(50_000):
        now = step * 0.1
        if step < length:
            writer.item(RID, 5, b"%d" % step)
        elif step == length:
            writer.done(RID, 5, f.Done(5, 0), b"", now)
        writer.flush(now)
        arriving = [
            frames for frames in writer.outgoing for _ in range(chance.choice([1, 1, 2])) if chance.random() >= loss
        ]
        writer.outgoing.clear()
        for frames in arriving:
            if frames[0][1] in (f.Kind.CHUNK, f.Kind.DONE):
                for event in reader.receive(frames, now):
                    if isinstance(event, c.Items):
                        got += event.items
                        reader.consumed(RID, len(event.items))
                    ended += isinstance(event, c.Ended)
        reader.tick(now)
        for message in said(reader, f.CLIENT_TO_DAEMON):
            if chance.random() >= loss:
                _pass_on(message, writer)
        if ended and not writer.kept:
            break
    assert got == [b"%d" % number for number in range(length)]
    assert ended == 1


def _pass_on(message: f.Message, writer: h.HostProtocol) -> None:
    """What a daemon makes of a client's message, in short."""
    if isinstance(message.header, f.Ack):
        told(writer, f.Kind.ACK, message.header)
    elif isinstance(message.header, f.ClientHello):
        for waiting in message.header.open:
            told(writer, f.Kind.RUN, f.Run(5, waiting.have_seq, "/", True))
    elif isinstance(message.header, f.Submit):
        told(writer, f.Kind.RUN, f.Run(5, message.header.have_seq, "/", True))
