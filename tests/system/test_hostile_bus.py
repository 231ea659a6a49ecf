"""What comes over the bus's sockets from those who should not be there: counted, answered where it can be, dropped."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import psutil
import pytest
from engine_models import openai, simulated
from machine import Machine, machine, wait_for
from raw_peer import Peer

import llmos
from llmos.errors import Invalid, NotFound, TooLarge
from llmos.protocol import frames as f

BODY_MAX = 1 << 20
#: In messages that no daemon takes on.
RID = bytes(range(16))


@pytest.fixture(scope="module")
def shared() -> Iterator[Machine]:
    with machine() as made:
        made.configure(f'[scheduler]\nbody_max = "{BODY_MAX}"\nanswer_max = "{BODY_MAX}"\n')
        made.model(simulated("sim", slots=2, decode_rate=100))
        made.model(openai("loaded", "openai_like.py", "--port", "{port}", "--rate", "50"))
        made.start()
        made.client.wait(made.client.start("sim").workers)
        yield made


@pytest.fixture(params=["front", "back"])
def side(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def counted(shared: Machine, name: str) -> int:
    return shared.client.status().counters.get(name, 0)


def check_service(shared: Machine) -> None:
    """Nothing fell over, and others are served."""
    assert shared.client.run("sim", "one two", max_tokens=2, timeout=20).completion_tokens == 2
    assert counted(shared, "faults") == 0
    assert shared.worker("sim@1").restarts == 0


def test_random_bytes_are_counted_and_dropped(shared: Machine, side: str) -> None:
    chance = random.Random(7)
    before = counted(shared, "bad_frames")
    count = 2000
    with Peer(shared, side) as peer:
        for _ in range(count):
            peer.say(*(chance.randbytes(chance.choice((0, 1, 2, 16, 300))) for _ in range(chance.randint(1, 6))))
        wait_for("count of all of it", lambda: counted(shared, "bad_frames") == before + count)
    check_service(shared)


def wrong_frames(side: str) -> list[list[bytes]]:
    """Messages that are nearly right, each wrong in one way."""
    kind = f.Kind.SUBMIT if side == "front" else f.Kind.DONE
    header = f.Submit("sim", "/v1/completions") if side == "front" else f.Done(1, 1)
    first, rid, packed, payload = f.encode(kind, RID, header, b"{}")
    deep = b"\x91" * 200_000 + b"\xc0"
    return [
        [first, rid],  # too few
        [b"\x09" + first[1:], rid, packed, payload],  # another version
        [first[:1] + b"\xfe", rid, packed, payload],  # no such kind
        [f.FIRST_FRAME[f.Kind.RUN], rid, packed, payload],  # a kind of the other direction
        [first, rid[:-1], packed, payload],  # a short id
        [first, b"", packed, payload],  # none
        [first, rid, packed[:-1], payload],  # truncated
        [first, rid, b"", payload],
        [first, rid, b"\xc1", payload],  # never used in msgpack
        [first, rid, deep, payload],  # nested without end
        [first, rid, b"\xdd\xff\xff\xff\xff", payload],  # an array of four thousand million, of which nothing comes
        [first, rid, b"\xdb\xff\xff\xff\xff" + b"x" * 100, payload],  # a text of that length
        [first, rid, msgspec.msgpack.encode({"model": "sim"}), payload],  # an object, not an array
        [first, rid, msgspec.msgpack.encode([1.5, b"x", None, [], {}]), payload],  # wrong types
        [first, rid, msgspec.msgpack.encode("x" * 900_000), payload],  # a huge header
        [b"\x00" * 60_000] * 10,
        [b""] * 50_000,  # very many parts
    ]


def test_messages_that_are_nearly_right_are_counted_each_and_dropped(shared: Machine, side: str) -> None:
    before = counted(shared, "bad_frames")
    wrong = wrong_frames(side)
    with Peer(shared, side) as peer:
        for parts in wrong:
            peer.say(*parts)
        wait_for("count of all of it", lambda: counted(shared, "bad_frames") == before + len(wrong))
    check_service(shared)


def test_a_client_that_speaks_another_version_is_told_so(shared: Machine) -> None:
    with Peer(shared, "front") as peer:
        peer.say(b"\x09\x03", RID, b"", b"{}")
        answer = peer.hear(f.DAEMON_TO_CLIENT)
    assert isinstance(answer.header, f.Failed) and answer.rid == RID
    assert answer.header.code == f.Code.INVALID and "version 9 is not spoken here" in answer.header.message


#: By a field's type: values that can be read, and are absurd.
ABSURD: dict[str, tuple[object, ...]] = {
    "bytes": (b"", bytes(16), bytes(24), b"\xff" * 24),
    "str": ("", "sim", "sim@1", "/v1/completions", "\0", "ä" * 200, "../../etc/passwd", "{}" * 50),
    "bool": (True, False),
    "float": (0.0, -3.0, 1e300),
    "Priority": (0, -(2**31), 2**31 - 1),
    "Number": (0, 1, 5, 2**31, 2**53),
    "int": (None, -(2**63), 2**63 - 1),
    "tuple[Number": ((), (5, 0, 2**53)),
    "OpenRequest": ((), ((RID, 2**53, b"x"),)),
    "HeldRequest": ((), ((RID, 2**53, 2**53, 0, True),)),
}
#: Values that no field can have.
NONSENSE = (None, 2**64 - 1, -(2**63), float("nan"), {"a": 1}, [[]] * 3)


def absurd(header: type[f.Header], chance: random.Random) -> list[object]:
    """The fields of a header: nearly always readable, hardly ever sensible."""
    values: list[object] = []
    for field in header.__annotations__.values():
        choices = ABSURD[next(name for name in reversed(ABSURD) if name in field)]
        values.append(chance.choice(NONSENSE) if chance.random() < 0.02 else chance.choice(choices))
    return values


def test_well_formed_messages_with_absurd_values_do_no_harm(shared: Machine, side: str) -> None:
    chance = random.Random(11)
    kinds = f.FROM_CLIENT if side == "front" else f.FROM_WORKER
    identity, rids = b"", [os.urandom(16), os.urandom(16)]
    if side == "back":
        # In the name of a real worker that has a request, whose place this peer takes.
        shared.client.apply(simulated("fuzzed"))
        waiting = shared.client.run("fuzzed", "hello", stream=True, max_tokens=10_000)
        assert next(waiting).text
        rids.append(bytes.fromhex(shared.client.requests("fuzzed")[0].id))
        record = json.loads((shared.runtime / "workers" / "fuzzed@1.json").read_text())
        identity = b64decode(record["identity"])
    readable = 0
    with Peer(shared, side, identity) as peer:
        for _ in range(4000):
            kind = chance.choice(list(kinds))
            rid = chance.choice(rids) if kind in f.ABOUT_A_REQUEST else b""
            header = msgspec.msgpack.encode(absurd(kinds[kind], chance))
            parts = [f.FIRST_FRAME[kind], rid, header, b'{"prompt": "x"}']
            try:
                f.decode(f.CLIENT_TO_DAEMON if side == "front" else f.WORKER_TO_DAEMON, parts)
                readable += 1
            except f.FrameError:
                pass
            peer.say(*parts)
        assert readable > 3000
        shared.client.requests()
        check_service(shared)
    if side == "back":
        waiting.close()
        shared.client.remove("fuzzed")


def test_a_worker_that_nobody_started_is_not_heard(shared: Machine) -> None:
    before = counted(shared, "unknown_worker")
    with Peer(shared, "back") as peer:
        peer.say(*f.encode(f.Kind.HELLO, b"", f.WorkerHello(b"x" * 16, b"t" * 32, 1, "ready", 4096)))
        peer.say(*f.encode(f.Kind.STATUS, b"", f.Status("ready", 1.0, 4096)))
        wait_for("count of it", lambda: counted(shared, "unknown_worker") == before + 2)
    check_service(shared)


def test_a_worker_with_the_right_identity_and_a_wrong_token_is_not_heard_and_whom_it_displaced_is_replaced(
    shared: Machine,
) -> None:
    text = simulated("displaced", rest='[timeouts]\nsilence = "500ms"\n')
    shared.client.wait(shared.client.apply(text).workers or shared.client.start("displaced").workers)
    record = json.loads((shared.runtime / "workers" / "displaced@1.json").read_text())
    before = counted(shared, "unknown_worker")
    with Peer(shared, "back", b64decode(record["identity"])) as peer:
        hello = f.WorkerHello(b64decode(record["identity"]), b"wrong", 1, "ready", 4096)
        peer.say(*f.encode(f.Kind.HELLO, b"", hello))
        wait_for("count of it", lambda: counted(shared, "unknown_worker") > before)
    # ZeroMQ has given its place away, so the worker is deaf: that shows as soon as it has something to do.
    assert shared.client.run("displaced", "hello", max_tokens=2).completion_tokens == 2
    assert shared.worker("displaced@1").restarts == 1
    check_service(shared)


def test_a_body_over_the_bound_is_refused_before_it_is_sent_and_cuts_off_only_who_sends_it_raw(shared: Machine) -> None:
    with pytest.raises(TooLarge, match=f"the daemon takes {BODY_MAX}"):
        shared.client.run("sim", "x" * BODY_MAX)
    submit = f.Submit("sim", "/v1/completions")
    with Peer(shared, "front") as peer:
        peer.say(*f.encode(f.Kind.SUBMIT, RID, submit, b" " * (BODY_MAX + 1)))
        answer = peer.hear(f.DAEMON_TO_CLIENT).header
        assert isinstance(answer, f.Failed) and answer.code == f.Code.TOO_LARGE
    bystander = shared.client
    answer_of_a_neighbour = bystander.run("sim", "one two", stream=True, max_tokens=50)
    assert next(answer_of_a_neighbour).text
    with Peer(shared, "front") as peer:
        peer.say(*f.encode(f.Kind.SUBMIT, RID, submit, bytes(BODY_MAX * 4)))
        assert len([piece for piece in answer_of_a_neighbour if piece.text]) == 49
    check_service(shared)


def test_what_is_no_zeromq_at_all_does_no_harm(shared: Machine, side: str) -> None:
    with ExitStack() as open_sockets:
        for number in range(300):
            raw = open_sockets.enter_context(socket.socket(socket.AF_UNIX))
            raw.connect(str(shared.runtime / f"{side}.sock"))
            if number % 3 == 0:
                raw.send(b"GET / HTTP/1.1\r\n\r\n" * 10)
            elif number % 3 == 1:
                raw.send(b"\xff" + os.urandom(500))
        check_service(shared)
    check_service(shared)


def test_a_client_that_floods_is_answered_and_counted_and_delays_others_little(shared: Machine) -> None:
    before = shared.client.status()
    count = 30_000
    submit = f.encode(f.Kind.SUBMIT, RID, f.Submit("no-such-model", "/v1/completions"), b"{}")
    with Peer(shared, "front") as peer:
        for _ in range(count):
            peer.say(*submit)
        began = time.monotonic()
        check_service(shared)
        assert time.monotonic() - began < 10
        counter = f"rejected_{f.Code.NOT_FOUND}"
        wait_for("count of all of it", lambda: counted(shared, counter) == before.counters.get(counter, 0) + count)
    assert psutil.Process(before.pid).memory_info().rss < before.memory_bytes + (100 << 20)


def test_a_body_that_is_no_json_is_an_error_of_its_sender(shared: Machine) -> None:
    rid = os.urandom(16)
    with Peer(shared, "front") as peer:
        peer.say(*f.encode(f.Kind.SUBMIT, rid, f.Submit("sim", "/v1/completions"), b"\xff{not json"))
        peer.hear(f.DAEMON_TO_CLIENT)  # ACCEPTED
        answer = peer.hear(f.DAEMON_TO_CLIENT).header
        peer.say(*f.encode(f.Kind.ACK, rid, f.Ack(1)))
    assert isinstance(answer, f.Failed) and answer.code == f.Code.INVALID and "not JSON" in answer.message
    for params in ({"max_tokens": "many"}, {"max_tokens": -1}):
        with pytest.raises((Invalid, llmos.errors.EngineError), match="max_tokens"):
            shared.client.run("sim", "hello", **params)
    with pytest.raises(NotFound, match="no model 'sin'"):
        shared.client.run("sin", "hello")


CLIENT = """
import sys, llmos
client = llmos.Client(sys.argv[1])
for piece in client.run(sys.argv[2], "on and on", stream=True, max_tokens=100000):
    print(piece.text, flush=True)
"""


def test_a_client_that_is_killed_mid_stream_takes_its_request_from_the_engine(shared: Machine) -> None:
    for model in ("sim", "loaded"):
        command = [sys.executable, "-c", CLIENT, str(shared.runtime), model]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None and client.stdout.readline()
            assert shared.worker(f"{model}@1").slots_used == 1
            client.send_signal(signal.SIGKILL)
        # Far sooner than any time-out: the daemon holds a pidfd of the client's process.
        wait_for("free slot", lambda m=model: shared.worker(f"{m}@1").slots_used == 0, 2)  # type: ignore[misc]
        assert not [request for request in shared.client.requests(model) if request.state == "running"]
    check_service(shared)
