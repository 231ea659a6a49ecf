"""The gateway's listening socket: where it can be asked how it is, the same for every daemon with the same settings."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llmosd.listen import HttpSocket
from llmosd.programs import gateway_spec
from llmosd.settings import Settings


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("127.0.0.1:8484", "http://127.0.0.1:8484/health"),
        ("localhost:8484", "http://localhost:8484/health"),
        ("[::1]:8484", "http://[::1]:8484/health"),
        ("::1:8484", "http://[::1]:8484/health"),
        ("127.0.0.1:0", ""),
    ],
)
def test_it_is_asked_where_it_listens(address: str, url: str) -> None:
    assert HttpSocket(address).health_url == url


def test_that_does_not_change_by_being_opened() -> None:
    for address in ("localhost:0", "127.0.0.1:0"):
        opened = HttpSocket(address)
        opened.fileno()
        assert opened.health_url == HttpSocket(address).health_url
        opened.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_socket_that_was_passed_on_is_asked_on_this_machine_whatever_the_settings_say(host: str) -> None:
    with socket.create_server((host, 0)) as listening:
        port = listening.getsockname()[1]
        passed = HttpSocket("127.0.0.1:8484", listening.detach(), systemds=True)
        assert passed.health_url == f"http://127.0.0.1:{port}/health"
        passed.close()


def test_a_unix_socket_that_was_passed_on_is_not_asked(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "http.sock"))
        passed = HttpSocket("127.0.0.1:8484", listening.detach(), systemds=True)
        assert passed.health_url == ""
        passed.close()


def test_a_gateway_is_asked_whether_it_is_ready_and_whether_it_lives_where_that_is_known() -> None:
    spec = gateway_spec(Settings(), "http://127.0.0.1:8484/health")
    assert spec.says_ready and spec.ready.http == spec.liveness.http == "http://127.0.0.1:8484/health"
    assert not gateway_spec(Settings(), "").says_ready
