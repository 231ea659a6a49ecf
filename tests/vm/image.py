"""The disks of the test machine: Debian 12 from Debian's packages, and this project as it is installed on it.

Two layers, each kept under .vm/ by a hash of what it is made from. The base takes a minute and changes with this file
and with the project's dependencies; the project takes seconds and changes with its source. Nothing is downloaded when
the machine runs. Works for root, and for an ordinary user who has fakeroot and may make user namespaces.

    python tests/vm/image.py    builds what is missing
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = ROOT / ".vm"
#: Debian keeps mkfs out of the way of ordinary users.
PATH: Final = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

#: systemd-python is compiled against libsystemd; Debian has it compiled, in the version that our extra asks for.
PACKAGES: Final = (
    "systemd", "systemd-sysv", "dbus", "udev", "linux-image-cloud-amd64", "qemu-guest-agent", "python3-venv",
    "python3-systemd", "curl", "procps", "zstd",
)  # fmt: skip
#: Debian 12's Python, and the newest C library that wheels for it may want: 2.36.
WHEELS: Final = (
    "--only-binary=:all:", "--implementation=cp", "--python-version=3.11",
    *(f"--platform=manylinux{tag}_x86_64" for tag in ("_2_34", "_2_28", "_2_17", "2014")),
)  # fmt: skip
#: Where the project's disk is mounted: beside the virtual environment, which finds it through a .pth file.
MOUNTED: Final = "/opt/llmosd/project"
LABEL: Final = "llmosd"

#: Run in the new root file system, before it becomes a disk.
SET_UP: Final = f"""
echo llmosd-vm > /etc/hostname
echo 'LABEL={LABEL} {MOUNTED} ext4 noatime 0 0' > /etc/fstab
# Jobs of a long-lived machine, which would run in the middle of a test.
systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer
# The agent has a line for each time that it is asked whether a command has ended.
mkdir /etc/systemd/system/qemu-guest-agent.service.d
printf '[Service]\\nLogLevelMax=warning\\n' > /etc/systemd/system/qemu-guest-agent.service.d/quiet.conf
# Without what other machines boot from: the initrd is unpacked under emulation.
sed -i 's/^MODULES=.*/MODULES=list/' /etc/initramfs-tools/initramfs.conf
printf 'virtio_pci\nvirtio_blk\n' >> /etc/initramfs-tools/modules
update-initramfs -u > /dev/null
python3 -m venv --system-site-packages /opt/llmosd
/opt/llmosd/bin/pip install --quiet --no-index --no-deps /tmp/wheels/*.whl
echo {MOUNTED} > /opt/llmosd/lib/python3.11/site-packages/project.pth
ln -s {MOUNTED}/bin/llmosd {MOUNTED}/bin/llmos /usr/bin
"""


class Image(NamedTuple):
    """What a machine is booted from. Disks are never written to: QEMU keeps what the guest writes elsewhere."""

    kernel: Path
    initrd: Path
    root: Path
    project: Path


def build() -> Image:
    """Build what is missing, and return where everything is. Raises CalledProcessError, or SystemExit for a tool."""
    CACHE.mkdir(exist_ok=True)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = [line for line in declared["optional-dependencies"]["systemd"] if not line.startswith("systemd-python")]
    dependencies = [*declared["dependencies"], *extra]
    base = _cached(
        "base",
        [Path(__file__).read_bytes(), *(line.encode() for line in dependencies)],
        lambda directory: _build_base(directory, dependencies),
    )
    sources = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    for tree in ("llmosd", "client/llmos", "systemd"):
        sources += sorted(p for p in (ROOT / tree).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    parts = (part for path in sources for part in (str(path.relative_to(ROOT)).encode(), path.read_bytes()))
    project = _cached("project", [Path(__file__).read_bytes(), *parts], _build_project)
    return Image(base / "vmlinuz", base / "initrd.img", base / "root.img", project / "project.img")


def _cached(name: str, made_from: Iterable[bytes], make: Callable[[Path], None]) -> Path:
    """The directory of a layer. One that is not complete never has its final name; older ones are removed."""
    key = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16]
    final = CACHE / f"{name}-{key}"
    if final.exists():
        return final
    print(f"==> building the test machine's {name}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=CACHE) as made:
        make(Path(made))
        for old in CACHE.glob(f"{name}-*"):
            shutil.rmtree(old)
        Path(made).rename(final)
        Path(made).mkdir()  # for TemporaryDirectory to remove
    print(f"==> built in {time.monotonic() - started:.0f} s", flush=True)
    return final


def _build_base(directory: Path, dependencies: list[str]) -> None:
    wheels, tree, archive = directory / "wheels", directory / "tree", directory / "root.tar"
    _pip("download", "--dest", wheels, *WHEELS, *dependencies)
    (directory / "set-up").write_text(SET_UP)
    _run(
        "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}",
        f"--customize-hook=copy-in {wheels} {directory / 'set-up'} /tmp",
        '--customize-hook=chroot "$1" sh -e /tmp/set-up',
        "bookworm", archive,
    )  # fmt: skip
    tree.mkdir()
    # One shell, for files keep their owners only within one fakeroot. Devices are the kernel's to make.
    script = 'tar -x -f "$1" -C "$2" --exclude="./dev/*" && mkfs.ext4 -q -m 0 -d "$2" "$3" 3G'
    prefix = () if os.geteuid() == 0 else (_tool("fakeroot"),)
    _run(*prefix, "sh", "-c", script, "sh", archive, tree, directory / "root.img")
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(tree / name, directory / name)
    for left in (wheels, tree):
        shutil.rmtree(left)
    archive.unlink()


def _build_project(directory: Path) -> None:
    tree = directory / "tree"
    _pip("wheel", "--no-deps", "--wheel-dir", directory, ROOT)
    # pip compiles for the Python that runs it. Where that is not a 3.11 the guest does so itself, slowly.
    _pip("install", "--no-deps", "--target", tree, *directory.glob("*.whl"))
    for script in (tree / "bin").iterdir():
        _, _, code = script.read_text().partition("\n")
        script.write_text(f"#!/opt/llmosd/bin/python3\n{code}")
    shutil.copytree(ROOT / "systemd", tree / "systemd")
    _run("mkfs.ext4", "-q", "-m", "0", "-L", LABEL, "-d", tree, directory / "project.img", "64M")
    shutil.rmtree(tree)


def _pip(*command: str | Path) -> None:
    _run(sys.executable, "-m", "pip", command[0], "-qq", *command[1:])


def _run(program: str, *arguments: str | Path) -> None:
    # Errors are on stderr; mkfs says on stdout which file it makes.
    environment = os.environ | {"PATH": PATH}
    subprocess.run(
        [_tool(program), *arguments], check=True, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )


def _tool(name: str) -> str:
    path = shutil.which(name, path=PATH)
    if path is None:
        raise SystemExit(f"{name} is not installed: apt install qemu-system-x86 mmdebstrap e2fsprogs fakeroot")
    return path


if __name__ == "__main__":
    build()
