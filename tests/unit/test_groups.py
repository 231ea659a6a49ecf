"""Groups of processes, where what they are found by comes and goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llmosd.node.cgroups import CgroupGroup


def test_a_cgroup_that_goes_while_it_is_looked_at_has_no_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroup = tmp_path / "sim@1-1"
    cgroup.mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == cgroup and cgroup.exists():
            cgroup.rmdir()
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    group = CgroupGroup(cgroup)
    assert group.members() == []
    cgroup.mkdir()
    group.release()
    assert not cgroup.exists()
