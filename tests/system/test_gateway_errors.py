"""What the gateway answers to bad input: always an answer, in OpenAI's shape where it was HTTP; and it goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import openai
import pytest
from machine import SIMULATED, Machine, machine, wait_for
from web import curl, post, wait_for_requests

BODY_MAX = 256 << 10
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[Machine]:
    with machine() as made:
        made.configure('[scheduler]\nbody_max = "256K"', gateway=True)
        made.model(SIMULATED)
        made.start()
        yield made
        # Whatever came in, the gateway is the one that was started.
        assert made.worker("gateway@1").restarts == 0
        assert "Traceback" not in made.llmos("logs", "-n", "all", "gateway@1").stdout


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("not json", "the body is not JSON"),
        ("", "it is empty"),
        ('{"model": "sim"', "not JSON"),
        ("[1, 2]", "not an object"),
        ("{}", 'add "model"'),
        ('{"model": 3}', "'model' must be text"),
        ('{"model": "sim", "stream": "yes"}', "'stream' must be true or false"),
        ('{"model": "sim\\ud800"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_body_that_is_wrong_is_400_and_says_how(served: Machine, body: str, message: str) -> None:
    answer = post(served, COMPLETIONS, body)
    assert answer.status == 400
    assert message in answer.error


@pytest.mark.parametrize("header", ["Expect: 100-continue", "Expect:", "Transfer-Encoding: chunked"])
def test_a_body_that_is_too_large_is_413_however_it_comes(served: Machine, header: str) -> None:
    body = json.dumps({"model": "sim", "prompt": "x" * BODY_MAX})
    answer = post(served, COMPLETIONS, body, "-H", header)
    assert answer.status == 413
    assert answer.error == f"the body is larger than {BODY_MAX} bytes"


def test_a_client_that_asks_before_it_sends_is_answered_at_once(served: Machine) -> None:
    body = b'{"model": "sim", "prompt": "x", "max_tokens": 1}'
    with socket.create_connection(("127.0.0.1", served.http_port), timeout=10) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        client.sendall(head % len(body))
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("path", ["/", "/nope", "/v2/models", "/v1", "/v1/", "/v1/a b", "/v1/x%3Fy=1", "/slots"])
def test_an_unknown_path_is_404_and_names_those_there_are(served: Machine, path: str) -> None:
    for args in ((), ("-d", '{"model": "sim"}')):
        answer = curl(served, path.replace(" ", "%20"), *args)
        assert answer.status == 404
        assert "/v1/chat/completions" in answer.error


@pytest.mark.parametrize("path", ["/v1/../slots", "/v1/%2e%2e/slots", "/v1/..%2fslots", "/v1/a/../../slots"])
def test_a_path_that_climbs_out_of_v1_never_reaches_an_engine(served: Machine, path: str) -> None:
    before = served.client.status().counters.get("accepted", 0)
    assert curl(served, path, "--path-as-is", "-d", '{"model": "sim"}').status == 404
    assert served.client.status().counters.get("accepted", 0) == before


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", COMPLETIONS, "POST"),
        ("PUT", COMPLETIONS, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/sim", "GET, HEAD"),
        ("OPTIONS", "/metrics", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_405_and_says_which_is_right(served: Machine, method: str, path: str, allow: str) -> None:
    answer = curl(served, path, "-X", method)
    assert (answer.status, answer.headers["allow"]) == (405, allow)
    assert f"{method} is not taken" in answer.error


def test_a_multipart_body_is_415(served: Machine) -> None:
    assert curl(served, "/v1/audio/transcriptions", "-F", "model=sim").status == 415


def test_a_body_that_is_not_what_its_encoding_says_is_400(served: Machine) -> None:
    answer = post(served, COMPLETIONS, "not gzip", "-H", "Content-Encoding: gzip")
    assert answer.status == 400
    assert "the body cannot be read" in answer.error


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00" + b"\0" * 64,
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
def test_what_is_not_http_is_answered_and_hung_up_on(served: Machine, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.http_port), timeout=10) as client:
        client.sendall(data)
        assert client.recv(12).endswith(b" 400")
    assert curl(served, "/health").status == 200


def test_a_client_that_goes_away_within_its_body_leaves_nothing(served: Machine) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", served.http_port)) as client:
            client.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{"model": "sim"')
    wait_for_requests(served, "sim", 0)
    assert curl(served, "/health").status == 200


def test_a_hundred_bad_requests_cost_the_good_ones_nothing(served: Machine) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        for number in range(100):
            with socket.create_connection(("127.0.0.1", served.http_port)) as bad:
                bad.sendall(b"%d garbage\r\n\r\n" % number)
            if number % 10 == 0:
                begun = time.monotonic()
                client.completions.create(model="sim", prompt="x", max_tokens=1)
                assert time.monotonic() - begun < 5


def test_only_who_has_a_key_is_served_and_is_accounted_to_its_tenant(a_machine: Machine) -> None:
    keys = a_machine.root / "keys"
    keys.write_text("# who may\nalice:sk-alice\nsk-nobody   # in particular\n")
    a_machine.configure(f'api_keys_file = "{keys}"', gateway=True)
    a_machine.model(SIMULATED.replace("200", "5"))
    a_machine.start()
    assert curl(a_machine, "/health").status == 200
    for args in ((), ("-H", "Authorization: Bearer wrong"), ("-H", "Authorization: Basic sk-alice"),
                 ("-H", "Authorization: Bearer sk-älice")):  # fmt: skip
        answer = curl(a_machine, "/v1/models", *args)
        assert answer.status == 401
        assert "Authorization: Bearer KEY" in answer.error
    with openai.OpenAI(base_url=f"{a_machine.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        allowed = client.with_options(api_key="sk-alice")
        assert [model.id for model in allowed.models.list()] == ["sim"]
        stream = allowed.completions.create(model="sim", prompt="x", max_tokens=1000, stream=True)
        next(iter(stream))
        table = a_machine.llmos("ps", "-T").stdout
        assert "alice" in table
        stream.close()
    wait_for_requests(a_machine, "sim", 0)


@pytest.mark.parametrize(("text", "reason"), [(None, "No such file"), ("# none\n", "has no key"), (":x\n", "line 1")])
def test_a_gateway_that_cannot_know_its_keys_does_not_open_and_says_why(
    a_machine: Machine, text: str | None, reason: str
) -> None:
    keys = a_machine.root / "keys"
    if text is not None:
        keys.write_text(text)
    a_machine.configure(f'api_keys_file = "{keys}"', gateway=True)
    a_machine.start(expect_failure=True)
    assert a_machine.daemon is not None
    assert a_machine.daemon.wait(20) == 1
    a_machine.daemon = None
    wait_for("reason", lambda: f"gateway.api_keys_file: {keys}" in a_machine.log() and reason in a_machine.log())
