"""Which maker confines the workers on this machine: the strongest there is, or the one that the settings name."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final, NamedTuple

from llmosd.launch.cgroup import cgroup_of
from llmosd.node.cgroups import KNOBS
from llmosd.node.confine import Confinement
from llmosd.node.confine.controllers import ControllerConfinement, io_is_weighed
from llmosd.node.confine.process import ProcessConfinement
from llmosd.node.delegated import NotDelegated, with_controllers, without_controllers
from llmosd.node.groups import Groups
from llmosd.node.marked import MarkedGroups

log = logging.getLogger("llmosd")

#: Where systemd is PID 1, the tree of cgroups is its own; a maker of our own would arrange what it arranges.
_BOOTED: Final = Path("/run/systemd/system")
_WEIGHED: Final = frozenset({"io_weight"})


class Maker(NamedTuple):
    """Who sees to which limit, and who makes the groups."""

    confinement: Confinement
    groups: Groups


class NoSuchMaker(Exception):  # noqa: N818  # an answer, not a fault
    """The maker that was asked for cannot work here. The text says why."""


async def choose(wanted: str, name: str) -> Maker:
    """`wanted`: systemd, cgroup, process, or auto. `name`: of a cgroup of our own. Raises NoSuchMaker."""
    if wanted == "systemd" or (wanted == "auto" and _BOOTED.is_dir()):
        try:
            return await _systemd(name)
        except (OSError, ImportError) as error:
            missing = isinstance(error, ImportError)
            why = f"{error}; pip install 'llmosd[systemd]' brings what it needs" if missing else str(error)
            if wanted == "systemd":
                raise NoSuchMaker(f"systemd cannot make scopes for workers: {why}") from None
            log.warning("workers are confined process by process, for systemd cannot make scopes for them: %s", why)
    if wanted == "cgroup" or (wanted == "auto" and not _BOOTED.is_dir()):
        try:
            return _cgroup(name)
        except NotDelegated as error:
            if wanted == "cgroup":
                raise NoSuchMaker(f"there is no cgroup to confine workers in: {error}") from None
    return _process(name)


def _process(name: str) -> Maker:
    try:
        groups: Groups = without_controllers(name)
    except NotDelegated:
        groups = MarkedGroups(name)
    return Maker(ProcessConfinement(), groups)


def _cgroup(name: str) -> Maker:
    groups = with_controllers(name)
    held = groups.held if io_is_weighed() else groups.held - _WEIGHED
    return Maker(ControllerConfinement("cgroup", held, ProcessConfinement()), groups)


async def _systemd(name: str) -> Maker:
    if cgroup_of("self") is None:
        raise NotDelegated("no cgroup v2 tree is mounted")
    # Only where there is systemd is there a reason to have the library.
    from llmosd.node.scopes import ScopeGroups
    from llmosd.node.systemd import Manager, SystemdError

    manager = Manager()
    await manager.connect()
    try:
        unit = await manager.unit_of(os.getpid())
    except SystemdError:
        unit = ""  # started by hand, in a session that is nobody's unit
    held = frozenset(limit for limit, knob in KNOBS.items() if knob.controller in _controllers(os.geteuid()))
    held = held if io_is_weighed() else held - _WEIGHED
    if not _swap_is_counted():
        held -= {"swap_max"}
    return Maker(ControllerConfinement("systemd", held, ProcessConfinement()), ScopeGroups(manager, held, unit, name))


def _swap_is_counted() -> bool:
    """Whether a cgroup that has the memory controller can bound its swap: a boot option takes that away."""
    ours = cgroup_of("self")
    with_memory = [d for d in (ours, *ours.parents) if (d / "memory.max").exists()] if ours is not None else []
    return not with_memory or (with_memory[0] / "memory.swap.max").exists()


def _controllers(uid: int) -> frozenset[str]:
    """The controllers that systemd, or a user's own instance of it, has to give."""
    root = Path("/sys/fs/cgroup")
    where = root if uid == 0 else root / f"user.slice/user-{uid}.slice/user@{uid}.service"
    try:
        return frozenset((where / "cgroup.controllers").read_text().split())
    except OSError:
        return frozenset()  # hybrid or v1: systemd's limits would be v1's, which we do not know how to read
