"""Quantities as people write them: any text is read, and written back the same, or refused in a sentence."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmosd.kernel.spec import Limits
from llmosd.kernel.units import Bytes, CpuSet, Percent, Quantity, Seconds, decode_quantity, encode_quantity

KINDS: tuple[type[Quantity], ...] = (Bytes, Seconds, Percent, CpuSet)
#: What TOML may hold where a quantity is expected.
ANYTHING = st.one_of(
    st.text(max_size=30),
    st.from_regex(r"\s*[0-9]{1,400}(\.[0-9]{1,3})?\s*[a-zA-Z\u212a%]{0,3}\s*", fullmatch=True),
    st.from_regex(r"[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?){0,5}", fullmatch=True),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.dates(),
    st.lists(st.integers(), max_size=2),
    st.none(),
)


@given(st.sampled_from(KINDS), ANYTHING)
def test_anything_at_all_is_read_or_refused_in_a_sentence(kind: type[Quantity], value: Any) -> None:
    try:
        read = decode_quantity(kind, value)
    except ValueError as error:
        assert "got" in str(error)
        assert len(str(error)) < 200
        return
    assert decode_quantity(kind, encode_quantity(read)) == read
    assert len(str(read)) > 0
    if isinstance(read, Bytes):
        assert 0 <= read < 1 << 63
    if isinstance(read, Seconds):
        assert 0 <= read < 1e10


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("700M", 700 << 20), ("1.5G", 3 << 29), ("2 GiB", 2 << 30), ("3kb", 3 << 10), (" 1T ", 1 << 40), (5, 5)],
)
def test_sizes_are_powers_of_1024_as_systemd_reads_them(text: object, size: int) -> None:
    assert Bytes.parse(text) == size


@pytest.mark.parametrize("text", ["2\u212a", "1e3", "-1", "1 2", "M", "", "9" * 400, "2P", -1, 1.5, True, 1 << 70])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        Bytes.parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10m", 600), ("1.5h", 5400), ("200ms", 0.2), ("2min", 120), ("1d", 86400), (3, 3), (0.5, 0.5)],
)
def test_spans_of_time_have_units_and_seconds_need_none(text: object, seconds: float) -> None:
    assert Seconds.parse(text) == seconds


@pytest.mark.parametrize(
    "text", ["5 minutes", "-1s", "inf", "9" * 400 + "d", "200000d", float("inf"), float("nan"), -1]
)
def test_what_is_no_span_of_time_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="span of time"):
        Seconds.parse(text)


def test_a_percentage_is_of_one_cpu_and_never_nothing() -> None:
    assert Percent.parse("150%") == 150
    for wrong in ("0%", "150", 150, "-5%", "1.5%"):
        with pytest.raises(ValueError, match="percentage of one CPU such as 150%"):
            Percent.parse(wrong)


def test_a_set_of_cpus_is_sorted_and_written_in_ranges() -> None:
    assert CpuSet.parse("8, 0-3,2") == (0, 1, 2, 3, 8)
    assert str(CpuSet.parse("8,0-3,2")) == "0-3,8"


@pytest.mark.parametrize("text", ["", "3-1", "a", "0-", "9999", ",", "0,,1", ",".join(["0-8191"] * 100)])
def test_what_is_no_set_of_cpus_is_refused_however_long(text: str) -> None:
    with pytest.raises(ValueError, match="set of CPUs such as 0-3,8"):
        CpuSet.parse(text)


@given(st.sets(st.integers(0, 8191), min_size=1, max_size=50))
def test_every_set_of_cpus_is_read_back(cpus: set[int]) -> None:
    assert set(CpuSet.parse(str(CpuSet(cpus)))) == cpus


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack])
def test_limits_that_were_written_down_are_read_back_as_they_were(codec: Any) -> None:
    limits = Limits(
        allowed_cpus=CpuSet([0, 2, 3]), cpu_quota=Percent(150), memory_max=Bytes(1 << 30), request_timeout=Seconds(1.5)
    )
    written = codec.encode(limits, enc_hook=encode_quantity)
    read = codec.decode(written, type=Limits, dec_hook=decode_quantity)
    assert read == limits
    assert [type(getattr(read, name)) for name in ("allowed_cpus", "cpu_quota", "memory_max")] == [
        CpuSet,
        Percent,
        Bytes,
    ]


@pytest.mark.parametrize("value", [[-1], [8192], ["0"], [True], [1.5], list(range(10_000)), []])
def test_a_list_that_is_no_set_of_cpus_is_refused(value: list[object]) -> None:
    with pytest.raises(ValueError, match="expected a set of CPUs"):
        CpuSet.parse(value)
