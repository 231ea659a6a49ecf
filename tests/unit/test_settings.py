"""llmosd.toml: read, refused in words, and where everything lives."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmosd import settings
from llmosd.declared import DeclarationError, read_toml
from llmosd.settings import Settings


@given(st.text())
def test_any_text_is_settings_or_refused(text: str) -> None:
    try:
        read_toml(text, Settings, "llmosd.toml")
    except DeclarationError as error:
        assert str(error).startswith("llmosd.toml: ")


def refusal(tmp_path: Path, text: str) -> str:
    file = tmp_path / "llmosd.toml"
    file.write_text(text)
    with pytest.raises(DeclarationError) as caught:
        settings.read(file)
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value).removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gatway]", "unknown key 'gatway'; did you mean 'gateway'?"),
        ("listen = 3", "unknown key 'listen'; did you mean 'gateway.listen'?"),
        (
            '[gateway]\nlisten = "8484"',
            "gateway.listen: expected address and port; only this machine's own addresses, got '8484'",
        ),
        ('[gateway]\nlisten = "127.0.0.1:99999"', "gateway.listen: 99999 is no port; they go to 65535"),
        ('[gateway]\nenabled = "yes"', "gateway.enabled: expected true or false, got 'yes'"),
        (
            '[logs]\nlevel = "loud"',
            "logs.level: expected one of debug, error, info, warning, got 'loud'",
        ),
        ('[logs]\nmax_size = "1 meg"', "logs.max_size: expected a size such as 512M or 2G, got '1 meg'"),
        (
            '[scheduler]\nplacement = "bestfit"',
            "scheduler.placement: expected one of best_fit, first_fit, worst_fit, got 'bestfit'; "
            "did you mean 'best_fit'?",
        ),
        ("[scheduler]\nwindow = 1", "scheduler.window: expected a whole number from 2 to 65536, got 1"),
    ],
)
def test_a_wrong_setting_is_refused_with_file_key_and_what_was_expected(
    tmp_path: Path, text: str, message: str
) -> None:
    assert refusal(tmp_path, text) == message


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:8484", "[::]:8484", "192.168.1.5:80", "example.org:80", "127.0.0.1.example.org:80", "127.1:80"]
)
def test_an_address_that_others_can_reach_is_refused_with_the_reason(tmp_path: Path, listen: str) -> None:
    message = refusal(tmp_path, f'[gateway]\nlisten = "{listen}"')
    assert "needs TLS and tokens" in message
    assert "put a proxy with TLS in front" in message


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.8.8:1", "localhost:65535", "[::1]:8484"])
def test_an_address_of_this_machine_is_taken(tmp_path: Path, listen: str) -> None:
    file = tmp_path / "llmosd.toml"
    file.write_text(f'[gateway]\nlisten = "{listen}"')
    assert settings.read(file).gateway.listen == listen


def test_no_file_means_the_defaults(tmp_path: Path) -> None:
    assert settings.read(tmp_path / "llmosd.toml") == Settings()


def test_a_file_that_cannot_be_read_is_not_no_file(tmp_path: Path) -> None:
    (tmp_path / "llmosd.toml").mkdir()
    with pytest.raises(DeclarationError, match="cannot be read: "):
        settings.read(tmp_path / "llmosd.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    with pytest.raises(DeclarationError, match="cannot be read: "):
        settings.read(tmp_path / "binary.toml")


def test_a_runtime_directory_in_which_no_socket_fits_is_refused(tmp_path: Path) -> None:
    directories = settings.directories(tmp_path / ("x" * 100))
    with pytest.raises(DeclarationError, match="too long for sockets"):
        directories.make()


def test_everything_is_below_the_root_that_is_given(tmp_path: Path) -> None:
    directories = settings.directories(tmp_path / "r")
    directories.make()
    assert directories.runtime.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"etc", "run", "lib", "log"}


def test_users_have_the_directories_of_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    directories = settings.directories()
    assert directories.config == tmp_path / ".config/llmosd"
    assert directories.runtime == Path("/tmp/llmosd-1234")
    assert directories.logs == tmp_path / ".local/state/llmosd/log"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1234")
    assert settings.directories().runtime == Path("/run/user/1234/llmosd")
