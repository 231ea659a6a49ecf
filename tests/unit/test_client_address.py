"""Finding the daemon: where the library looks, in which order, and what it says when there is none."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos import address
from llmos.errors import DaemonUnreachable

UID = os.getuid()


def listen(directory: Path) -> Path:
    """A directory with a socket as a daemon has it."""
    directory.mkdir(parents=True)
    (directory / "control.sock").touch()
    return directory


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The system's runtime directory, elsewhere."""
    monkeypatch.setattr(address, "SYSTEM_DIRECTORY", tmp_path / "system")
    yield tmp_path / "system"


def test_a_host_goes_before_the_environment_and_that_before_a_search(tmp_path: Path, system: Path) -> None:
    named, by_environment = listen(tmp_path / "named"), listen(tmp_path / "environment")
    listen(system)
    environ = {"LLMOS_HOST": str(by_environment)}
    assert address.find(str(named), environ, UID).runtime_directory == named
    assert address.find(None, environ, UID).runtime_directory == by_environment
    assert address.find(None, {}, 0).runtime_directory == system


@pytest.mark.parametrize("form", ["{}", "unix://{}", "unix://{}/control.sock"])
def test_a_host_is_a_directory_or_a_unix_address(tmp_path: Path, form: str) -> None:
    directory = listen(tmp_path / "here")
    found = address.find(form.format(directory), {}, UID)
    assert found.control == f"unix:{directory}/control.sock"
    assert found.bus == f"ipc://{directory}/front.sock"


def test_a_host_that_is_somewhere_else_altogether_is_refused() -> None:
    with pytest.raises(DaemonUnreachable, match="no unix://"):
        address.find("tcp://127.0.0.1:80", {}, UID)


def test_a_host_without_a_daemon_is_an_error_even_if_another_daemon_runs(tmp_path: Path, system: Path) -> None:
    listen(system)
    with pytest.raises(DaemonUnreachable, match="LLMOS_HOST names"):
        address.find(None, {"LLMOS_HOST": str(tmp_path / "nowhere")}, UID)


def test_an_ordinary_users_own_daemon_goes_before_the_systems(tmp_path: Path, system: Path) -> None:
    listen(system)
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    uid = UID or 1000
    assert address.find(None, environ, uid).runtime_directory == system
    own = listen(tmp_path / "llmosd")
    assert address.find(None, environ, uid).runtime_directory == own


def test_root_means_the_systems_daemon(tmp_path: Path, system: Path) -> None:
    listen(tmp_path / "llmosd")
    assert address.candidates({"XDG_RUNTIME_DIR": str(tmp_path)}, 0) == [system]


def test_without_a_runtime_directory_it_is_under_tmp(system: Path) -> None:
    assert address.candidates({}, 4711) == [Path("/tmp/llmosd-4711"), system]
    assert address.candidates({"XDG_RUNTIME_DIR": "relative"}, 4711)[0] == Path("/tmp/llmosd-4711")


def test_a_directory_that_another_user_made_is_not_trusted(tmp_path: Path) -> None:
    listen(tmp_path / "llmosd")
    if UID == 0:
        os.chown(tmp_path / "llmosd", 4712, -1)
    with pytest.raises(DaemonUnreachable, match="belongs to user"):
        address.find(None, {"XDG_RUNTIME_DIR": str(tmp_path)}, 4711)


def test_no_daemon_anywhere_names_the_places(tmp_path: Path, system: Path) -> None:
    with pytest.raises(DaemonUnreachable) as caught:
        address.find(None, {"XDG_RUNTIME_DIR": str(tmp_path)}, 4711)
    message = str(caught.value)
    assert f"{tmp_path}/llmosd/control.sock" in message
    assert f"{system}/control.sock" in message
    assert "LLMOS_HOST" in message


def test_a_path_that_no_socket_can_have_is_said(tmp_path: Path) -> None:
    directory = listen(tmp_path / ("x" * 100) / "llmosd")
    if UID == 0:
        os.chown(directory, 4711, -1)
    with pytest.raises(DaemonUnreachable, match="107 bytes"):
        address.find(None, {"XDG_RUNTIME_DIR": str(directory.parent)}, UID or 4711)


def test_silence_is_explained(tmp_path: Path) -> None:
    found = address.Address(tmp_path)
    assert "there is no" in found.why_silent()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(found.control_path))
        assert "nobody listens" in found.why_silent()
        listener.listen()
        assert "somebody listens" in found.why_silent()
