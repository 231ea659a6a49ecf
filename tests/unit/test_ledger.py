"""The ledger, placement and eviction: never over-committed, all or nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.protocol import frames as f
from llmosd.kernel.cpus import Cpu
from llmosd.kernel.eviction import victims
from llmosd.kernel.ledger import Capacity, Grant, Ledger
from llmosd.kernel.placement import FITS, Gpu, best_fit, first_fit, worst_fit
from llmosd.kernel.requests import Request
from llmosd.kernel.spec import ModelSpec, Resources, Simulated
from llmosd.kernel.units import Bytes
from llmosd.kernel.worker import Worker

GPUS = (Gpu("a", 40), Gpu("b", 10), Gpu("c", 80))
capacities = st.builds(
    Capacity,
    st.integers(0, 8000),
    st.integers(0, 100),
    st.lists(st.integers(0, 50), max_size=4).map(lambda sizes: tuple(Gpu(f"g{n}", s) for n, s in enumerate(sizes))),
    # As the node counts them: never more thousandths than there are CPUs.
    st.just(tuple(Cpu(number, 0, number // 2, number // 4) for number in range(8))),
)
wants = st.builds(
    Resources,
    cpus=st.integers(0, 9000).map(lambda millis: millis / 1000),
    cpu_placement=st.sampled_from(["shared", "exclusive"]),
    memory=st.integers(0, 120).map(Bytes),
    gpus=st.integers(0, 5),
    gpu_memory=st.integers(0, 120).map(Bytes),
)
placements = st.sampled_from(sorted(FITS))


@given(capacities, placements, st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), wants)), max_size=40))
def test_nothing_is_ever_over_committed_and_a_reservation_is_whole_or_nothing(
    capacity: Capacity, placement: str, commands: list[tuple[int, Resources | None]]
) -> None:
    ledger = Ledger(capacity, placement)
    for number, want in commands:
        owner, before = f"w{number}", ledger.free()
        if want is None:
            ledger.release(owner)
            assert ledger.grant_of(owner) is None
        elif isinstance(grant := ledger.reserve(owner, want), str):
            assert grant, "a refusal says why"
            assert ledger.free() == before
        else:
            exclusive = want.cpu_placement == "exclusive"
            assert grant.millicpus == (len(grant.cpus) * 1000 if exclusive else round(want.cpus * 1000))
            assert bool(grant.cpus) == exclusive
            assert len(grant.cpus) >= want.cpus or not exclusive
            assert grant.memory_bytes == want.memory
            if want.gpus and want.gpu_memory:
                assert len(grant.gpus) == want.gpus
                assert sum(grant.gpus.values()) >= want.gpu_memory
        free = ledger.free()
        assert free.millicpus >= 0
        assert free.memory_bytes >= 0
        grants = [grant for n in range(4) if (grant := ledger.grant_of(f"w{n}")) is not None]
        assert free.cpus, "the last shared CPU was given away"
        assert len(free.cpus) + sum(len(grant.cpus) for grant in grants) == len(capacity.cpus)
        assert sum(grant.millicpus for grant in grants if not grant.cpus) <= len(free.cpus) * 1000
        assert all(gpu.memory_bytes >= 0 for gpu in free.gpus)
    for number in range(4):
        ledger.release(f"w{number}")
    assert ledger.free() == capacity


@given(capacities, placements, wants)
def test_what_fits_an_empty_ledger_is_what_could_ever_fit(capacity: Capacity, placement: str, want: Resources) -> None:
    ledger = Ledger(capacity, placement)
    possible = ledger.could_ever_fit(want) is None
    assert ledger.fits(want) == possible
    assert ledger.free() == capacity, "asking reserves nothing"
    assert isinstance(ledger.reserve("w", want), Grant) == possible


def test_an_owner_has_one_reservation() -> None:
    ledger = Ledger(Capacity(4000, 0))
    assert isinstance(ledger.reserve("w", Resources(cpus=1)), Grant)
    assert ledger.reserve("w", Resources(cpus=1)) == "w already holds a reservation"


def test_what_an_adopted_worker_brought_counts_even_where_the_machine_has_shrunk() -> None:
    ledger = Ledger(Capacity(1000, 0))
    ledger.restore("old", Grant(3000))
    assert ledger.free().millicpus == -2000
    assert isinstance(ledger.reserve("new", Resources(cpus=0.1)), str)


def test_the_three_rules_choose_as_knuth_describes_them() -> None:
    assert first_fit(GPUS, 1, 20) == ["a"]
    assert best_fit(GPUS, 1, 5) == ["b"]
    assert worst_fit(GPUS, 2, 5) == ["c", "a"]
    assert first_fit(GPUS, 3, 20) is None


@given(st.sampled_from(sorted(FITS)), st.lists(st.integers(0, 9), max_size=6), st.integers(1, 4), st.integers(0, 9))
def test_every_rule_finds_a_place_if_there_is_one(rule: str, sizes: list[int], count: int, size: int) -> None:
    gpus = [Gpu(str(number), memory) for number, memory in enumerate(sizes)]
    chosen = FITS[rule](gpus, count, size)
    if sum(memory >= size for memory in sizes) < count:
        assert chosen is None
    else:
        assert chosen is not None
        assert len(set(chosen)) == count
        assert all(gpu.memory_bytes >= size for gpu in gpus if gpu.uuid in chosen)


def holding(ledger: Ledger, name: str, cpus: float, idle_since: float) -> Worker:
    worker = Worker(name, name, ModelSpec(model=name, engine=Simulated()))
    worker.idle_since = idle_since
    assert isinstance(ledger.reserve(name, Resources(cpus=cpus)), Grant)
    return worker


def test_the_least_recently_used_go_and_no_more_than_needed() -> None:
    ledger = Ledger(Capacity(4000, 0))
    idle = [holding(ledger, "new", 1, 30), holding(ledger, "old", 1, 10), holding(ledger, "middle", 1, 20)]
    names = [worker.name for worker in victims(ledger, [], idle, Resources(cpus=3))]
    assert names == ["old", "middle"]


def test_nobody_goes_where_what_leaves_already_is_enough() -> None:
    ledger = Ledger(Capacity(2000, 0))
    leaving, idle = holding(ledger, "leaving", 1, 5), holding(ledger, "idle", 1, 1)
    assert victims(ledger, [leaving], [idle], Resources(cpus=1)) == []


def test_nobody_goes_in_vain() -> None:
    ledger = Ledger(Capacity(2000, 0))
    idle = [holding(ledger, "one", 1, 1), holding(ledger, "two", 1, 2)]
    assert victims(ledger, [], idle, Resources(cpus=3)) == []


def test_who_still_keeps_answers_goes_last() -> None:
    ledger = Ledger(Capacity(2000, 0))
    keeping, free = holding(ledger, "keeping", 1, 1), holding(ledger, "free", 1, 2)
    keeping.requests[b"r"] = Request(b"r", f.Submit("m", ""), b"", "m", 0.0)
    assert victims(ledger, [], [keeping, free], Resources(cpus=1)) == [free]
