"""The frames: every kind survives the wire, and garbage is refused with a FrameError and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.protocol import frames as f

TABLES = {
    "client": (f.CLIENT_TO_DAEMON, f.FROM_CLIENT),
    "to_client": (f.DAEMON_TO_CLIENT, f.TO_CLIENT),
    "worker": (f.WORKER_TO_DAEMON, f.FROM_WORKER),
    "to_worker": (f.DAEMON_TO_WORKER, f.TO_WORKER),
}
tables = st.sampled_from([table for table, _ in TABLES.values()])
first_frames = st.one_of(st.sampled_from([bytes((f.VERSION, kind)) for kind in f.Kind]), st.binary(max_size=4))
rids = st.one_of(st.just(b""), st.binary(min_size=16, max_size=16), st.binary(max_size=40))


@pytest.mark.parametrize("name", TABLES)
@given(data=st.data())
def test_every_kind_survives_the_wire(name: str, data: st.DataObject) -> None:
    table, kinds = TABLES[name]
    kind = data.draw(st.sampled_from(sorted(kinds)))
    header = data.draw(headers(kinds[kind]))
    rid = bytes(range(16)) if kind in f.ABOUT_A_REQUEST else b""
    payload = data.draw(st.lists(st.binary(max_size=20), max_size=3))
    message = f.decode(table, f.encode(kind, rid, header, *payload))
    assert (message.kind, message.rid, message.header, message.payload) == (kind, rid, header, payload)
    again = f.decode(table, [bytes((f.VERSION, kind)), rid, message.raw_header, *payload])
    assert again.header == header, "a header that is passed on as it came means the same"


def headers(kind: type[f.Header]) -> st.SearchStrategy[f.Header]:
    """Headers with numbers as large as the wire allows."""
    number, text = st.integers(0, 2**53), st.text(st.characters(codec="utf-8"), max_size=20)
    by_type: dict[object, st.SearchStrategy[object]] = {
        "Number": number, "str": text, "bool": st.booleans(), "bytes": st.binary(max_size=40),
        "Priority": st.integers(-(2**31), 2**31 - 1), "int | None": st.none() | st.integers(-(2**63), 2**63 - 1),
        "float": st.floats(allow_nan=False), "tuple[Number, ...]": st.lists(number, max_size=4).map(tuple),
        "tuple[bytes, ...]": st.lists(st.binary(max_size=20), max_size=4).map(tuple),
    }  # fmt: skip
    if kind in (f.ClientHello, f.WorkerHello):
        by_type["tuple[OpenRequest, ...]"] = st.lists(headers(f.OpenRequest), max_size=3).map(tuple)
        by_type["tuple[HeldRequest, ...]"] = st.lists(headers(f.HeldRequest), max_size=3).map(tuple)
    return st.builds(kind, **{name: by_type[hint] for name, hint in kind.__annotations__.items()})


@given(st.integers(-(2**63), 2**64 - 1).filter(lambda number: not 0 <= number <= 2**53))
def test_a_number_that_is_negative_or_beyond_a_doubles_reach_is_refused(number: int) -> None:
    with pytest.raises(f.FrameError):
        f.decode(f.CLIENT_TO_DAEMON, f.encode(f.Kind.ACK, bytes(16), f.Ack(number)))


@given(tables, st.lists(st.binary(max_size=60), max_size=6))
def test_bytes_are_refused_with_a_frame_error_and_nothing_else(table: f.Table, frames: list[bytes]) -> None:
    try:
        f.decode(table, frames)
    except f.FrameError as error:
        assert error.code


@given(tables, first_frames, rids, st.binary(max_size=200), st.lists(st.binary(max_size=20), max_size=2))
def test_a_right_beginning_does_not_make_garbage_a_message(
    table: f.Table, first: bytes, rid: bytes, header: bytes, payload: list[bytes]
) -> None:
    try:
        message = f.decode(table, [first, rid, header, *payload])
    except f.FrameError:
        return
    assert len(message.rid) == (16 if message.kind in f.ABOUT_A_REQUEST else 0)


@given(st.data())
def test_a_message_that_was_cut_or_flipped_never_raises_anything_else(data: st.DataObject) -> None:
    table, kinds = data.draw(st.sampled_from(list(TABLES.values())))
    kind = data.draw(st.sampled_from(sorted(kinds)))
    frames = f.encode(kind, bytes(16) if kind in f.ABOUT_A_REQUEST else b"", data.draw(headers(kinds[kind])), b"x")
    damaged = bytearray(frames[2])
    if damaged:
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        f.decode(table, [frames[0], frames[1], bytes(damaged[: data.draw(st.integers(0, len(damaged)))])])
    except f.FrameError:
        pass  # that is what it is for


@pytest.mark.parametrize("depth", [10, 100_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    with pytest.raises(f.FrameError):
        f.decode(f.CLIENT_TO_DAEMON, [bytes((f.VERSION, f.Kind.HELLO)), b"", b"\x91" * depth])


@given(st.binary(max_size=50), st.integers(-5, 2**63), st.lists(st.integers(-5, 60), max_size=8))
def test_splitting_gives_all_of_the_payload_or_refuses(payload: bytes, count: int, sizes: list[int]) -> None:
    try:
        items = f.split(payload, count, tuple(sizes))
    except f.FrameError as error:
        assert error.code == "sizes"
    else:
        assert len(items) == count
        assert b"".join(items) == payload


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=9))
def test_what_was_joined_is_split_again(items: list[bytes]) -> None:
    sizes = tuple(map(len, items)) if len(items) > 1 else ()
    assert f.split(b"".join(items), len(items), sizes) == items


def test_another_version_is_named_in_the_refusal() -> None:
    with pytest.raises(f.FrameError, match="version 7 is not spoken here"):
        f.decode(f.CLIENT_TO_DAEMON, [b"\x07\x01", b"", b"\x90"])


def test_a_kind_that_this_peer_may_not_send_is_refused() -> None:
    run = f.encode(f.Kind.RUN, bytes(16), f.Run(1, 0, "/v1/completions", True))
    with pytest.raises(f.FrameError, match="no kind that this peer may send"):
        f.decode(f.CLIENT_TO_DAEMON, run)
