"""The file of what operators have stopped: read back as it was, of this boot only, and survived when it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmosd.held import HeldFile
from llmosd.kernel import effects as do
from llmosd.kernel import events as on

NOTHING = on.Held((), ())


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    file = HeldFile(tmp_path / "held.json")
    assert file.read() == NOTHING
    file.keep(do.KeepHeld(("m",), ("m@1", "n@2")))
    assert file.read() == on.Held(("m",), ("m@1", "n@2"))


def test_after_a_boot_nothing_is_held(tmp_path: Path) -> None:
    file = HeldFile(tmp_path / "held.json")
    file.path.write_text('{"boot_id": "another", "models": ["m"], "workers": []}')
    assert file.read() == NOTHING


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"boot_id": 1}', b"\xff\xfe", b'{"models": ["m"], "workers": 3}'])
def test_a_damaged_file_is_set_aside_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    file = HeldFile(tmp_path / "held.json")
    file.path.write_bytes(text)
    assert file.read() == NOTHING
    assert not file.path.exists()
    assert (tmp_path / "held.damaged").read_bytes() == text
    assert "may be started again" in caplog.text
