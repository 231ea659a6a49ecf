"""Which CPUs a worker has for its own, and how such sets are packed again. Pure; for the ledger.

The order is that of Kubernetes' static CPU manager (pkg/kubelet/cm/cpumanager/cpu_assignment.go, takeByTopology, with
the topology manager's preference for one NUMA node): one node before several, whole cores before single hardware
threads of several, and single threads from the cores that are broken into already. Best fit among nodes: a large hole
is kept for a large worker.

Memory does not follow a worker that moves, so one that sits on a single NUMA node is never moved off it for a tidier
set; only where it may not stay (the CPU is gone, not allowed any more, or another's) does it go anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations, islice
from typing import Final, NamedTuple

import msgspec

from llmosd.kernel.units import CpuSet

#: Choices that are tried at most where CPUs must be left to others: the search could take for ever.
_BRANCHES: Final = 500
#: Groups of NUMA nodes that are compared where one node is not enough; the fullest nodes come first.
_GROUPS_COMPARED: Final = 64

Cpus = frozenset[int]


class Cpu(msgspec.Struct, frozen=True):
    """A logical CPU, which is a hardware thread, and where it sits. -1: unknown."""

    number: int
    package: int = -1
    core: int = -1
    numa_node: int = -1


class Claim(NamedTuple):
    """One worker's part in the CPUs."""

    #: Its own; empty: it shares what nobody has for its own.
    cpus: Cpus
    #: Where it may run; None: anywhere.
    allowed: Cpus | None = None


class Cost(NamedTuple):
    """What is wrong with a worker's own CPUs, the worst first: less is better, compared as tuples."""

    #: CPUs that are gone, not allowed, or another worker's too.
    misplaced: int
    #: NUMA nodes it is spread over.
    numa_nodes: int
    #: Cores of which it has some hardware threads and not all: others slow it down there.
    split_cores: int


class Topology:
    """The usable CPUs by number, core and NUMA node. A CPU whose core is unknown counts as a core."""

    def __init__(self, cpus: Iterable[Cpu] = ()) -> None:
        self.node_of: dict[int, int] = {}
        self.core_of: dict[int, tuple[int, int]] = {}
        threads: dict[tuple[int, int], set[int]] = {}
        for cpu in cpus:
            core = (cpu.package, cpu.core) if cpu.core >= 0 else (-1, -1 - cpu.number)
            self.node_of[cpu.number] = cpu.numa_node
            self.core_of[cpu.number] = core
            threads.setdefault(core, set()).add(cpu.number)
        self.threads_of = {core: frozenset(numbers) for core, numbers in threads.items()}
        self.cpus: Cpus = frozenset(self.node_of)

    def nodes(self, cpus: Iterable[int]) -> set[int]:
        return {self.node_of[cpu] for cpu in cpus if cpu in self.node_of}

    def memory_node(self, cpus: Iterable[int]) -> int | None:
        """The NUMA node that all of `cpus` are on; None too where there is only one, or nobody knows."""
        nodes = self.nodes(cpus)
        if len(nodes) != 1 or len(set(self.node_of.values())) == 1:
            return None
        (node,) = nodes
        return node if node >= 0 else None


def cost(topology: Topology, claim: Claim, others: Iterable[Claim] = ()) -> Cost:
    """What is wrong with a claim's own CPUs."""
    taken = frozenset[int]().union(*(other.cpus for other in others))
    allowed = topology.cpus if claim.allowed is None else topology.cpus & claim.allowed
    there = claim.cpus & topology.cpus
    split = sum(not topology.threads_of[core] <= there for core in {topology.core_of[cpu] for cpu in there})
    return Cost(len(claim.cpus - (allowed - taken)), len(topology.nodes(there)), split)


def choose(topology: Topology, count: int, free: Cpus, held: Cpus = frozenset()) -> Cpus | None:
    """`count` of the `free` CPUs, or None if there are not as many.

    On the fewest NUMA nodes; there with the fewest split cores, then with the most of those `held` so far, then where
    the least is left over.
    """
    if not 0 < count <= len(free):
        return None
    by_node: dict[int, set[int]] = {}
    for cpu in free:
        by_node.setdefault(topology.node_of[cpu], set()).add(cpu)
    nodes = sorted(by_node, key=lambda node: (-len(by_node[node]), node))
    room = spanned = 0
    while room < count:
        room += len(by_node[nodes[spanned]])
        spanned += 1
    best: tuple[tuple[int, int, int, list[int]], Cpus] | None = None
    for group in islice(combinations(nodes, spanned), _GROUPS_COMPARED):
        there = frozenset[int]().union(*(by_node[node] for node in group))
        if len(there) >= count:
            taken = _take(topology, count, there, held)
            rank = (cost(topology, Claim(taken)).split_cores, -len(taken & held), len(there), sorted(group))
            if best is None or rank < best[0]:
                best = rank, taken
    assert best is not None, "the first group is that of the fullest nodes, which have room"
    return best[1]


def _take(topology: Topology, count: int, free: Cpus, held: Cpus) -> Cpus:
    """Whole cores while they fit, the largest first; then threads of as few cores as can be, the most used ones."""
    by_core: dict[tuple[int, int], set[int]] = {}
    for cpu in free:
        by_core.setdefault(topology.core_of[cpu], set()).add(cpu)

    def order(core: tuple[int, int]) -> tuple[int, int]:
        return -len(by_core[core] & held), min(by_core[core])

    chosen: set[int] = set()
    whole = [core for core, cpus in by_core.items() if cpus == topology.threads_of[core]]
    for core in sorted(whole, key=lambda core: (-len(by_core[core]), *order(core))):
        if len(by_core[core]) <= count - len(chosen):
            chosen |= by_core.pop(core)
    while left := count - len(chosen):
        # The core with the least room that is enough, else the one with the most.
        core = min(by_core, key=lambda core: (max(0, left - len(by_core[core])), len(by_core[core]), *order(core)))
        chosen.update(sorted(by_core.pop(core), key=lambda cpu: (cpu not in held, cpu))[:left])
    return frozenset(chosen)


def _choose_sparing(
    topology: Topology, count: int, free: Cpus, spared: Sequence[Cpus], held: Cpus = frozenset()
) -> Cpus | None:
    """As `choose`, but of each set in `spared` at least one CPU is left. None: there is none, or none was found in
    _BRANCHES steps; such sets are a few workers' `allowed_cpus`."""
    return _spare(topology, count, free, spared, held, [_BRANCHES])


def _spare(
    topology: Topology, count: int, free: Cpus, spared: Sequence[Cpus], held: Cpus, steps: list[int]
) -> Cpus | None:
    if steps[0] == 0 or _disjoint(spared, free) > len(free) - count:
        return None
    steps[0] -= 1
    chosen = choose(topology, count, free, held)
    hurt = next((group for group in spared if chosen is not None and group <= chosen), None)
    if hurt is None:
        return chosen
    for cpu in sorted(hurt, key=lambda cpu: (-sum(cpu in group for group in spared), cpu)):
        others = [group for group in spared if cpu not in group]
        if (found := _spare(topology, count, free - {cpu}, others, held, steps)) is not None:
            return found
    return None


def _disjoint(groups: Sequence[Cpus], within: Cpus) -> int:
    """How many of the groups lie within a set and have no CPU in common, at least: so many must be left there."""
    taken: set[int] = set()
    count = 0
    for group in sorted(groups, key=len):
        if group <= within and not group & taken:
            taken |= group
            count += 1
    return count


def place(
    topology: Topology, count: int, allowed: Cpus | None, others: Mapping[str, Claim], held: Cpus = frozenset()
) -> Cpus | str:
    """`count` CPUs for a worker alone, or the reason why not, as a sentence.

    One CPU always stays shared, and of what each shared worker is allowed at least one.
    """
    pool = topology.cpus.difference(*(other.cpus for other in others.values()))
    free = pool if allowed is None else pool & allowed
    wish = f"needs {count} CPU{'s' * (count > 1)} of its own"
    if len(free) < count:
        bound = "" if allowed is None else f" out of its allowed_cpus, {CpuSet(allowed)}"
        return f"{wish}{bound}; {_listed(free)}"
    if len(pool) <= count:
        return f"{wish}; {_listed(pool)}, and one CPU always stays shared"
    shared = {
        name: other.allowed & pool
        for name, other in others.items()
        if not other.cpus and other.allowed is not None and other.allowed & pool
    }
    spared = sorted(set(shared.values()), key=sorted)
    found = _choose_sparing(topology, count, free, spared, held)
    if found is not None:
        return found
    wanted = choose(topology, count, free, held) or free
    name = next((name for name, cpus in shared.items() if cpus <= wanted), next(iter(shared)))
    return f"{wish}; then {name} would have none left of its allowed_cpus, {CpuSet(others[name].allowed or ())}"


def _listed(free: Cpus) -> str:
    return (
        f"CPU{'s' * (len(free) > 1)} {CpuSet(free)} {'is' if len(free) == 1 else 'are'} free"
        if free
        else "none is free"
    )


def repack(topology: Topology, claims: Mapping[str, Claim], movable: Collection[str]) -> dict[str, Cpus]:
    """The workers to move so that nobody's set could be better with what is free now, each with its new CPUs.

    One at a time, the one with the worst set first, and only to a set of less `cost`. So it comes to an end: no move
    makes another worker's set worse.
    """
    now = dict(claims)
    moved: dict[str, Cpus] = {}
    while True:
        costs = {name: cost(topology, now[name], _others(now, name).values()) for name in movable if now[name].cpus}
        for name in sorted(costs, key=lambda name: (*(-part for part in costs[name]), name)):
            better = _better(topology, now, name, costs[name])
            if better is not None:
                moved[name] = better
                now[name] = now[name]._replace(cpus=better)
                break
        else:
            return moved


def _better(topology: Topology, claims: Mapping[str, Claim], name: str, before: Cost) -> Cpus | None:
    claim, others = claims[name], _others(claims, name)
    allowed = claim.allowed
    if not before.misplaced and before.numa_nodes == 1:
        if not before.split_cores:
            return None
        (node,) = topology.nodes(claim.cpus)
        here = frozenset(cpu for cpu, its in topology.node_of.items() if its == node)
        allowed = here if allowed is None else here & allowed
    found = place(topology, len(claim.cpus), allowed, others, claim.cpus)
    if isinstance(found, str):
        return None
    after = cost(topology, claim._replace(cpus=found), others.values())
    return found if after < before else None


def _others(claims: Mapping[str, Claim], name: str) -> dict[str, Claim]:
    return {other: claim for other, claim in claims.items() if other != name}
