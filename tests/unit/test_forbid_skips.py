"""The plugin that `.ci/run` loads, run by a pytest of its own on small files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"


def run_pytest(directory: Path, source: str) -> tuple[int, str]:
    """Exit status and output of pytest with the plugin, on one test file."""
    (directory / "test_sample.py").write_text(f"import pytest\n\n{source}")
    (directory / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    # What the surrounding run was told must not reach this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "forbid_skips", "-p", "no:cacheprovider", str(directory)],
        env=environment | {"PYTHONPATH": str(PLUGINS)},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout


def test_a_skipped_test_fails_with_its_reason(tmp_path: Path) -> None:
    status, output = run_pytest(tmp_path, "def test_it() -> None:\n    pytest.skip('no left-handed screwdriver')\n")
    assert status == 1
    assert "1 failed" in output
    assert "no left-handed screwdriver" in output


def test_a_test_skipped_by_its_mark_fails(tmp_path: Path) -> None:
    status, output = run_pytest(tmp_path, "@pytest.mark.skipif(True, reason='never')\ndef test_it() -> None: ...\n")
    assert status == 1
    assert "1 error" in output


def test_a_module_that_skips_itself_fails(tmp_path: Path) -> None:
    status, output = run_pytest(tmp_path, "pytest.skip('not here', allow_module_level=True)\n")
    assert status != 0
    assert "not here" in output


def test_a_test_that_needs_a_gpu_may_be_skipped(tmp_path: Path) -> None:
    status, output = run_pytest(
        tmp_path, "@pytest.mark.gpu\ndef test_it() -> None:\n    pytest.skip('no GPU')\n\ndef test_other(): ...\n"
    )
    assert status == 0
    assert "1 passed, 1 skipped" in output


def test_an_expected_failure_stays_expected(tmp_path: Path) -> None:
    status, output = run_pytest(tmp_path, "@pytest.mark.xfail\ndef test_it() -> None:\n    raise ValueError\n")
    assert status == 0
    assert "1 xfailed" in output
