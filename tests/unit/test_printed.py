"""What a command prints, read while its log is written and rotated; and expressions that would never end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llmosd.node.printed import LINE_MAX, Expression, Printed, TooSlow, size_of


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "w@1.log"


def reading(log: Path, start: int = 0) -> Printed:
    return Printed(log, start)


def add(log: Path, text: bytes) -> None:
    with log.open("ab") as file:
        file.write(text)


def test_lines_are_given_once_and_only_when_they_have_ended(log: Path) -> None:
    printed = reading(log)
    assert printed.read() == (False, [])
    add(log, b"one\ntw")
    assert printed.read() == (True, [b"one"])
    assert printed.read() == (False, [])
    add(log, b"o\r10 %\r20 %\r\n\n")
    assert printed.read() == (True, [b"two", b"10 %", b"20 %"])


def test_what_an_earlier_life_printed_does_not_count(log: Path) -> None:
    add(log, b"ready\n")
    printed = reading(log, size_of(log))
    add(log, b"starting\n")
    assert printed.read() == (True, [b"starting"])


def test_a_line_without_end_counts_once_and_hides_nothing_after_it(log: Path) -> None:
    printed = reading(log)
    lines = []
    for _ in range(3):
        add(log, b"x" * LINE_MAX * 2)
        lines += printed.read()[1]
    add(log, b"\nready\n")
    lines += printed.read()[1]
    assert lines == [b"x" * LINE_MAX, b"ready"]


def test_who_prints_more_than_is_read_at_once_is_read_to_the_end_in_time(log: Path) -> None:
    printed = reading(log)
    add(log, (b"x" * 99 + b"\n") * 10_000 + b"ready\n")
    lines: list[bytes] = []
    while more := printed.read()[1]:
        lines += more
    assert lines[-1] == b"ready" and len(lines) == 10_001
    assert all(line in (b"x" * 99, b"ready") for line in lines), "no line is put together of two"


def test_a_file_cut_by_somebody_else_is_read_from_its_beginning(log: Path) -> None:
    printed = reading(log)
    add(log, b"one\ntwo\n")
    printed.read()
    log.write_bytes(b"3\n")
    assert printed.read() == (True, [b"3"])


def test_a_file_with_another_name_is_read_on_besides_the_new_one(log: Path) -> None:
    printed = reading(log)
    add(log, b"one\n")
    printed.read()
    older = log.rename(log.with_name("w@1.log.1"))
    add(older, b"two\n")
    assert printed.read() == (True, [b"two"])
    add(log, b"three\n")
    add(older, b"four\n")
    assert printed.read() == (True, [b"four", b"three"])
    printed.close()


# -- expressions ------------------------------------------------------------------------------------------------------


def test_an_expression_is_found_in_a_line_whatever_its_bytes() -> None:
    assert Expression("^listening on [0-9]+$").found_in([b"\xff\xfe", b"listening on 80"])
    assert not Expression("^listening$").found_in([b"not listening"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("(a+)+$", b"a" * 4000 + b"b"),
        (".*.*.*.*=.*!", b"x" * 4096),
        ("(?:[a-z ]+)*ready$", b"loading the model " * 200),
        ("(x|xx)+y", b"x" * 4096),
    ],
)
def test_a_search_without_end_is_ended(text: str, line: bytes) -> None:
    began = time.process_time()
    with pytest.raises(TooSlow):
        Expression(text).found_in([line])
    assert time.process_time() - began < 1.0
    assert Expression("b").found_in([b"ab"]), "and the next one is not"


def test_an_honest_search_through_much_is_not_too_slow() -> None:
    lines = [b"2026-01-01 12:00:00 INFO loading layer %d of 80" % number for number in range(5000)]
    assert not Expression(r"Uvicorn running on https?://[\w.:\[\]]+").found_in(lines)
