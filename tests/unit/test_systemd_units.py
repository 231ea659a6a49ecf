"""What lies in systemd/: read by systemd's own tools, where they are installed, and held to the rules of the daemon."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "systemd"

#: Settings that every worker would inherit and could not take back.
INHERITED = (
    "AmbientCapabilities", "BindPaths", "BindReadOnlyPaths", "CapabilityBoundingSet", "DevicePolicy", "DynamicUser",
    "InaccessiblePaths", "IPAddressDeny", "LockPersonality", "MemoryDenyWriteExecute", "MountFlags", "NoExecPaths",
    "NoNewPrivileges", "PrivateDevices", "PrivateIPC", "PrivateMounts", "PrivateNetwork", "PrivateTmp",
    "PrivateUsers", "ProcSubset", "ProtectClock", "ProtectControlGroups", "ProtectHome", "ProtectHostname",
    "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc", "ProtectSystem",
    "ReadOnlyPaths", "ReadWritePaths", "RestrictAddressFamilies", "RestrictFileSystems", "RestrictNamespaces",
    "RestrictRealtime", "RestrictSUIDSGID", "RootDirectory", "RootImage", "SecureBits", "SystemCallArchitectures",
    "SystemCallFilter", "TemporaryFileSystem",
)  # fmt: skip


def settings(unit: str) -> dict[str, list[str]]:
    """Every ``Name=value`` of a unit file, whatever its section."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", (UNITS / unit).read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian package: systemd)")
    return path


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_systemd_accepts_every_unit(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    daemon = tmp_path / "llmosd"
    daemon.write_text("#!/bin/sh\n")
    daemon.chmod(0o755)
    names = [path.name for path in UNITS.iterdir() if path.is_file()]
    assert len(names) == 5
    for name in names:
        # The daemon may be installed elsewhere, or nowhere: a unit whose program is missing is refused.
        text = (UNITS / name).read_text().replace("/usr/bin/llmosd", str(daemon))
        (tmp_path / name).write_text(text)
    paths = [tmp_path / name for name in names]
    done = run(analyze, "--man=no", "verify", *paths, SYSTEMD_UNIT_PATH=f"{tmp_path}:")
    # An unknown setting is a warning to systemd, and the machine's own units may have some of theirs.
    complaints = [line for line in done.stderr.splitlines() if "llmos" in line]
    assert not complaints, "\n".join(complaints)
    assert done.returncode == 0, done.stderr


def test_the_group_and_the_runtime_directory_are_made(tmp_path: Path) -> None:
    sysusers, tmpfiles = tool("systemd-sysusers"), tool("systemd-tmpfiles")
    (tmp_path / "etc").mkdir()
    done = run(sysusers, f"--root={tmp_path}", UNITS / "sysusers.d" / "llmosd.conf")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^llmos:", (tmp_path / "etc" / "group").read_text(), re.MULTILINE)
    done = run(tmpfiles, "--create", f"--root={tmp_path}", UNITS / "tmpfiles.d" / "llmosd.conf")
    if os.geteuid() != 0:
        assert "fchownat" in done.stderr, "only giving the directory away is denied to an ordinary user"
        return
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE((tmp_path / "run" / "llmosd").stat().st_mode) == 0o750


def test_no_setting_of_the_daemon_confines_its_workers() -> None:
    assert not set(settings("llmosd.service")) & set(INHERITED)


def test_workers_outlive_the_daemon_and_can_be_adopted() -> None:
    service = settings("llmosd.service")
    assert service["KillMode"] == ["process"]
    assert service["RuntimeDirectoryPreserve"] == ["yes"]
    assert service["Restart"] == ["always"]
    assert service["Delegate"] == ["yes"]


def test_the_daemon_tells_systemd_how_it_is() -> None:
    service = settings("llmosd.service")
    assert service["Type"] == ["notify"]
    assert int(service["WatchdogSec"][0]) > 0
    assert service["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


@pytest.mark.parametrize(
    ("unit", "listener", "name"),
    [
        ("llmosd.socket", "127.0.0.1:8484", "http"),
        ("llmosd-front.socket", "/run/llmosd/front.sock", "front"),
        ("llmosd-back.socket", "/run/llmosd/back.sock", "back"),
    ],
)
def test_a_socket_listens_on_this_machine_only_by_the_name_the_daemon_knows(
    unit: str, listener: str, name: str
) -> None:
    socket = settings(unit)
    assert socket["ListenStream"] == [listener]
    assert socket["FileDescriptorName"] == [name]
    assert socket.get("SocketMode", ["0660"]) == ["0660"]
