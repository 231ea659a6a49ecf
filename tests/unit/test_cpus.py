"""CPUs of a worker's own: one NUMA node first, whole cores before siblings, and packed again when one leaves."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmosd.kernel.cpus import Claim, Cost, Cpu, Topology, choose, cost, place, repack
from llmosd.kernel.units import CpuSet


def machine(nodes: int, cores: int, threads: int) -> list[Cpu]:
    """Numbered as Linux does it: first a thread of every core, then the siblings."""
    return [
        Cpu(thread * nodes * cores + node * cores + core, node, core, node)
        for thread in range(threads)
        for node in range(nodes)
        for core in range(cores)
    ]


FLAT = Topology(machine(1, 4, 1))  # 0 1 2 3
SMT = Topology(machine(1, 4, 2))  # 0,4 1,5 2,6 3,7
TWO_NODES = Topology(machine(2, 2, 1))  # 0 1 | 2 3
TWO_NODES_SMT = Topology(machine(2, 2, 2))  # 0,4 1,5 | 2,6 3,7
SPARSE = Topology([Cpu(3, 0, 1, 0), Cpu(9, 0, 0, 0), Cpu(40, 1, 0, 5), Cpu(41, 1, 0, 5), Cpu(77, 1, 9, 5)])
UNKNOWN = Topology([Cpu(0), Cpu(1), Cpu(2), Cpu(3)])
#: A core with two hardware threads, and two cores with one.
HYBRID = Topology([Cpu(0, 0, 8, 0), Cpu(1, 0, 9, 0), Cpu(2, 0, 0, 0), Cpu(3, 0, 0, 0)])


def own(cpus: str) -> Claim:
    return Claim(frozenset(CpuSet.parse(cpus)))


def sharing(allowed: str) -> Claim:
    return Claim(frozenset(), frozenset(CpuSet.parse(allowed)))


@pytest.mark.parametrize(
    ("topology", "free", "count", "chosen"),
    [
        (FLAT, "0-3", 1, "0"),
        (FLAT, "1,3", 2, "1,3"),
        (SMT, "0-7", 2, "0,4"),
        (SMT, "0-7", 3, "0-1,4"),
        (SMT, "0-7", 4, "0-1,4-5"),
        (SMT, "1-7", 1, "4"),  # from the core that is broken into already
        (SMT, "1-7", 2, "1,5"),
        (SMT, "1-7", 3, "1,4-5"),
        (SMT, "0,1,2,3", 2, "0-1"),  # there is no whole core
        (TWO_NODES, "0-3", 2, "0-1"),
        (TWO_NODES, "1-3", 2, "2-3"),
        (TWO_NODES, "1-3", 1, "1"),  # best fit: the hole is kept
        (TWO_NODES, "0-3", 3, "0-2"),
        (TWO_NODES, "1,2", 2, "1-2"),
        (TWO_NODES_SMT, "0-7", 4, "0-1,4-5"),
        (TWO_NODES_SMT, "1-7", 4, "2-3,6-7"),
        (TWO_NODES_SMT, "1-7", 3, "1,4-5"),
        (TWO_NODES_SMT, "0-1,2,6", 2, "2,6"),  # a whole core before the better fit
        (TWO_NODES_SMT, "0-7", 5, "0-2,4-5"),
        (SPARSE, "3,9,40-41,77", 2, "3,9"),
        (SPARSE, "3,40-41,77", 2, "40-41"),
        (SPARSE, "3,9,40-41,77", 3, "40-41,77"),
        (UNKNOWN, "0-3", 2, "0-1"),
        (HYBRID, "0-3", 2, "2-3"),
        (HYBRID, "0-3", 1, "0"),
        (HYBRID, "0-3", 3, "0,2-3"),
    ],
)
def test_one_node_before_several_and_whole_cores_before_siblings(
    topology: Topology, free: str, count: int, chosen: str
) -> None:
    found = choose(topology, count, frozenset(CpuSet.parse(free)))
    assert str(CpuSet(found or ())) == chosen


def test_there_is_no_choice_without_enough_cpus() -> None:
    assert choose(FLAT, 3, frozenset({0, 1})) is None
    assert choose(FLAT, 0, frozenset({0, 1})) is None
    assert choose(Topology(), 1, frozenset()) is None


@pytest.mark.parametrize(
    ("topology", "count", "allowed", "others", "answer"),
    [
        (FLAT, 4, None, {}, "needs 4 CPUs of its own; CPUs 0-3 are free, and one CPU always stays shared"),
        (FLAT, 1, None, {"a": own("0-2")}, "needs 1 CPU of its own; CPU 3 is free, and one CPU always stays shared"),
        (FLAT, 2, None, {"a": own("0-2")}, "needs 2 CPUs of its own; CPU 3 is free"),
        (FLAT, 2, "0,7", {}, "needs 2 CPUs of its own out of its allowed_cpus, 0,7; CPU 0 is free"),
        (FLAT, 1, "0", {"a": own("0")}, "needs 1 CPU of its own out of its allowed_cpus, 0; none is free"),
        (FLAT, 1, None, {"a": sharing("0")}, "1"),
        (FLAT, 2, None, {"a": sharing("0-1")}, "1-2"),
        (FLAT, 2, None, {"a": sharing("0-1"), "b": sharing("1-2"), "c": sharing("7")}, "0,2"),
        (FLAT, 3, None, {"a": sharing("0-1"), "b": sharing("1-2")}, "0,2-3"),
        (
            FLAT, 3, None, {"a": sharing("0"), "b": sharing("2-3"), "c": sharing("2")},
            "needs 3 CPUs of its own; then a would have none left of its allowed_cpus, 0",
        ),
        (Topology(), 1, None, {}, "needs 1 CPU of its own; none is free"),
    ],
)  # fmt: skip
def test_one_cpu_stays_shared_and_one_of_what_each_sharer_is_allowed(
    topology: Topology, count: int, allowed: str | None, others: Mapping[str, Claim], answer: str
) -> None:
    found = place(topology, count, frozenset(CpuSet.parse(allowed)) if allowed else None, others)
    assert (found if isinstance(found, str) else str(CpuSet(found))) == answer


def test_what_is_wrong_with_a_set_is_counted_the_worst_first() -> None:
    assert cost(TWO_NODES_SMT, own("0,4")) == Cost(0, 1, 0)
    assert cost(TWO_NODES_SMT, own("0,1")) == Cost(0, 1, 2)
    assert cost(TWO_NODES_SMT, own("0,2,6")) == Cost(0, 2, 1)
    assert cost(TWO_NODES_SMT, own("0,4,99")) == Cost(1, 1, 0), "a CPU that is gone"
    assert cost(TWO_NODES_SMT, Claim(frozenset({0, 4}), frozenset({0}))) == Cost(1, 1, 0), "one that is not allowed"
    assert cost(TWO_NODES_SMT, own("0,4"), [own("4")]) == Cost(1, 1, 0), "one that is another's too"
    assert Cost(0, 1, 9) < Cost(0, 2, 0) < Cost(1, 1, 0)


@pytest.mark.parametrize(
    ("topology", "claims", "moves"),
    [
        (TWO_NODES, {"a": own("1-2")}, {"a": "0-1"}),
        (TWO_NODES, {"a": own("1-2"), "b": own("0")}, {"a": "2-3"}),
        (TWO_NODES, {"a": own("0-1"), "b": own("2")}, {}),
        (SMT, {"a": own("0-1")}, {"a": "0,4"}),
        (SMT, {"a": own("0"), "b": own("1")}, {}),  # one thread is never a whole core
        (SMT, {"a": own("0,5"), "b": own("1,4")}, {"a": "2,6", "b": "0,4"}),
        (TWO_NODES_SMT, {"a": own("0-1"), "b": own("4")}, {"a": "1,5"}),  # and not 2,6: its memory is here
        (TWO_NODES_SMT, {"a": own("0-1"), "b": own("4-5")}, {}),
        (FLAT, {"a": own("0,9")}, {"a": "0-1"}),
        (FLAT, {"a": Claim(frozenset({0, 1}), frozenset({1, 2}))}, {"a": "1-2"}),
        (FLAT, {"a": own("0-1"), "b": own("1")}, {"a": "0,2"}),
        (FLAT, {"a": own("0-2"), "b": own("2")}, {}),  # the last CPU stays shared
        (TWO_NODES, {"a": own("1-2"), "b": sharing("0"), "c": sharing("3")}, {}),
    ],
)
def test_what_sits_badly_is_moved_and_nothing_else(
    topology: Topology, claims: dict[str, Claim], moves: dict[str, str]
) -> None:
    movable = [name for name, claim in claims.items() if claim.cpus]
    found = repack(topology, claims, movable)
    assert {name: str(CpuSet(cpus)) for name, cpus in found.items()} == moves


def test_who_cannot_be_moved_stays() -> None:
    claims = {"a": own("0-1"), "b": own("1")}
    assert repack(FLAT, claims, []) == {}
    assert repack(FLAT, claims, ["b"]) == {"b": frozenset({2})}


# -- whatever the machine ------------------------------------------------------------------------------------------

#: Cores of 1, 2 and 4 hardware threads, as there are; some of them known by number only.
cores = st.tuples(st.integers(0, 2), st.sampled_from([1, 2, 2, 4]), st.booleans())


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    made: list[Cpu] = []
    numbers = iter(draw(st.permutations(range(64))))
    for core, (node, threads, known) in enumerate(draw(st.lists(cores, min_size=1, max_size=8))):
        made += [Cpu(next(numbers), node, core if known else -1, node) for _ in range(threads)]
    return Topology(made)


@st.composite
def loads(draw: st.DrawFn) -> tuple[Topology, dict[str, Claim]]:
    """A machine, and who has what on it: sets that do not meet, one CPU shared, and sharers with something left."""
    topology = draw(topologies())
    left = draw(st.permutations(sorted(topology.cpus)))
    claims: dict[str, Claim] = {}
    for number in range(draw(st.integers(0, 4))):
        size = draw(st.integers(0, max(0, len(left) - 1)))
        if size:
            claims[f"own{number}"] = Claim(frozenset(left[:size]))
            left = left[size:]
    for number in range(draw(st.integers(0, 3))):
        allowed = draw(st.sets(st.sampled_from(sorted(topology.cpus)), max_size=3)) | {draw(st.sampled_from(left))}
        claims[f"shares{number}"] = Claim(frozenset(), frozenset(allowed))
    return topology, claims


def check(topology: Topology, claims: Mapping[str, Claim]) -> None:
    owned = [cpu for claim in claims.values() for cpu in claim.cpus]
    assert len(owned) == len(set(owned)), "a CPU is two workers' own"
    pool = topology.cpus - set(owned)
    assert pool, "the last shared CPU was taken"
    assert all(claim.allowed is None or claim.allowed & pool for claim in claims.values() if not claim.cpus)


@given(loads(), st.integers(1, 12))
def test_nothing_is_over_committed_and_the_choice_is_the_best_there_is(
    load: tuple[Topology, dict[str, Claim]], count: int
) -> None:
    topology, claims = load
    found = place(topology, count, None, claims)
    free = topology.cpus.difference(*(claim.cpus for claim in claims.values()))
    if isinstance(found, str):
        # With nobody bound to certain CPUs, only the number counts.
        assert len(free) <= count or any(claim.allowed for claim in claims.values())
        return
    assert len(found) == count
    assert found <= free
    check(topology, {**claims, "new": Claim(found)})
    assert found == place(topology, count, None, claims), "the same every time"
    if any(claim.allowed for claim in claims.values()):
        return
    room = {node: {cpu for cpu in free if topology.node_of[cpu] == node} for node in topology.nodes(free)}
    if any(len(cpus) >= count for cpus in room.values()):
        assert len(topology.nodes(found)) == 1, "one node could have held it"
        if cost(topology, Claim(found)).split_cores:
            for cpus in room.values():
                assert not _fill_whole(topology, cpus, count), "whole cores would have done"
    else:
        fullest = sorted(map(len, room.values()), reverse=True)
        assert sum(fullest[: len(topology.nodes(found)) - 1]) < count, "fewer nodes would have done"


def _fill_whole(topology: Topology, free: set[int], count: int) -> bool:
    """Whether whole cores of `free` sum up to `count`."""
    sums = {0}
    for threads in topology.threads_of.values():
        if threads <= free:
            sums |= {size + len(threads) for size in sums}
    return count in sums


@settings(max_examples=200)
@given(loads())
def test_every_choice_that_spares_the_sharers_is_found_if_there_is_one(
    load: tuple[Topology, dict[str, Claim]],
) -> None:
    topology, claims = load
    free = topology.cpus.difference(*(claim.cpus for claim in claims.values()))
    sharers = [claim.allowed & free for claim in claims.values() if not claim.cpus and claim.allowed is not None]
    # The fewest CPUs of which each sharer has one.
    kept: set[frozenset[int]] = {frozenset()}
    for allowed in sharers:
        kept = {hit if hit & allowed else hit | {cpu} for hit in kept for cpu in allowed}
    most = len(free) - max(1, min(map(len, kept)))
    if most:
        assert not isinstance(place(topology, most, None, claims), str)
    assert isinstance(place(topology, most + 1, None, claims), str)


@given(loads(), st.data())
def test_packing_again_only_improves_and_comes_to_an_end(
    load: tuple[Topology, dict[str, Claim]], data: st.DataObject
) -> None:
    topology, claims = load
    owners = sorted(name for name, claim in claims.items() if claim.cpus)
    movable = data.draw(st.sets(st.sampled_from(owners))) if owners else set()
    # Some of the machine is gone, perhaps.
    gone = data.draw(st.sets(st.sampled_from(sorted(topology.cpus)), max_size=2))
    shrunk = Topology(
        Cpu(number, 0 if core[0] < 0 else core[0], core[1] if core[1] >= 0 else -1, topology.node_of[number])
        for number, core in topology.core_of.items()
        if number not in gone
    )
    moves = repack(shrunk, claims, movable)
    after = {name: claim._replace(cpus=moves.get(name, claim.cpus)) for name, claim in claims.items()}
    assert set(moves) <= movable
    assert repack(shrunk, after, movable) == {}, "it was not finished"
    for name in owners:
        others_before = [claim for other, claim in claims.items() if other != name]
        others_after = [claim for other, claim in after.items() if other != name]
        old, new = cost(shrunk, claims[name], others_before), cost(shrunk, after[name], others_after)
        assert new < old if name in moves else new == old
        assert len(after[name].cpus) == len(claims[name].cpus)
        if name in moves and not old.misplaced and old.numa_nodes == 1:
            assert shrunk.nodes(moves[name]) == shrunk.nodes(claims[name].cpus), "its memory stays behind"
    owned = [cpu for claim in after.values() for cpu in claim.cpus]
    assert len(owned) == len(set(owned))
    if not gone:
        check(topology, after)
