"""The log writer's file and its way to the journal: bounded, and honest about what was lost."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmosd.logs.file import HALF_MIN, HEADER_MAX, Drops, LogFile, header
from llmosd.logs.journal import BURST, INTERVAL_S, LINE_MAX, Journal, JournalLines

CAP = 2 * HALF_MIN


@pytest.fixture
def drops() -> Drops:
    return Drops()


@pytest.fixture
def log(tmp_path: Path, drops: Drops) -> LogFile:
    return LogFile(str(tmp_path / "w.log"), CAP, drops)


def sizes(log: LogFile) -> int:
    return sum(path.stat().st_size for path in Path(log.path).parent.glob("w.log*"))


def test_both_files_together_never_pass_the_cap_whatever_is_written(log: LogFile) -> None:
    for piece in (b"a line\n", b"x" * 100_000, b"y" * HALF_MIN, b"\n" * 5000, b"z" * (HALF_MIN - 1) + b"\n"):
        log.write(piece)
        assert sizes(log) <= CAP


def test_a_file_begins_with_a_whole_line_and_says_which_byte_of_the_log_it_is(log: LogFile) -> None:
    lines = [b"line %d\n" % number for number in range(5000)]
    for line in lines:
        log.write(line)
    start = Path(log.path).read_bytes()
    begins, header_size = header(start[:HEADER_MAX])
    assert begins and b"".join(lines)[begins:] == start[header_size:]
    assert start[header_size:].startswith(b"line ")


def test_the_count_of_bytes_goes_on_with_another_writer_and_when_the_file_was_removed(log: LogFile) -> None:
    log.write(b"x" * 99 + b"\n")
    other = LogFile(log.path, CAP, Drops())
    other.write(b"y" * 99 + b"\n")
    Path(log.path).unlink()
    other.write(b"after\n")
    assert Path(log.path).read_bytes() == b"llmosd: this log goes on from byte 200\nafter\n"


def test_a_line_of_our_own_never_stands_within_the_workers(log: LogFile) -> None:
    log.write(b"half a li")
    log.say("ended: exit code 1")
    assert Path(log.path).read_bytes() == b"half a li\nllmosd: ended: exit code 1\n"


def test_a_file_that_cannot_be_written_costs_its_lines_and_says_so_when_it_can_be(log: LogFile, drops: Drops) -> None:
    log.write(b"one\n")
    Path(log.path).unlink()
    Path(log.path).mkdir()
    log.write(b"two\nthree\n")
    log.write(b"four\n")
    assert (drops.lines, log.unsaid) == (3, 3)
    assert not log.settle()
    Path(log.path).rmdir()
    log.write(b"five\n")
    assert Path(log.path).read_text().splitlines()[1:] == ["llmosd: 3 lines were dropped: Is a directory", "five"]
    assert (drops.lines, log.unsaid) == (3, 0)


def test_a_full_disk_is_named_as_the_reason(drops: Drops) -> None:
    full = LogFile("/dev/full", CAP, drops)
    full.write(b"one\ntwo\n")
    assert drops.lines == 2
    assert not full.settle()
    assert full._why == os.strerror(28)


# -- the journal ----------------------------------------------------------------------------------------------


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    """The end of a journald that is read by the test."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as end:
        end.bind(str(tmp_path / "journal"))
        yield end


def entries(journald: socket.socket) -> list[dict[str, str]]:
    found = []
    while True:
        try:
            text = journald.recv(1 << 20).decode()
        except BlockingIOError:
            return found
        found.append(dict(line.split("=", 1) for line in text.splitlines()))


def messages(journald: socket.socket) -> list[str]:
    return [entry["MESSAGE"] for entry in entries(journald)]


def test_each_line_is_an_entry_with_the_fields_of_worker_and_model(journald: socket.socket) -> None:
    lines = JournalLines(Journal(journald.getsockname()), "m@1", "m")
    lines.take(b"one\n\ntw", 0)
    lines.take(b"o=2\nrest", 0)
    lines.end()
    found = entries(journald)
    assert [entry["MESSAGE"] for entry in found] == ["one", "two=2", "rest"]
    fields = {"PRIORITY": "6", "SYSLOG_IDENTIFIER": "llmos", "LLMOS_WORKER": "m@1", "LLMOS_MODEL": "m"}
    assert all(fields.items() <= entry.items() for entry in found)


def test_a_line_that_is_too_long_is_cut_as_journald_cuts_it(journald: socket.socket) -> None:
    lines = JournalLines(Journal(journald.getsockname()), "m@1", "m")
    lines.take(b"x" * (2 * LINE_MAX + 5) + b"\n", 0)
    assert [len(message) for message in messages(journald)] == [LINE_MAX]
    lines.take(b"y" * (2 * LINE_MAX + 5), 0)
    lines.take(b"\n", 0)
    assert [len(message) for message in messages(journald)] == [LINE_MAX, LINE_MAX, 5]


def test_a_journald_that_is_away_or_does_not_read_costs_lines_and_never_waits(journald: socket.socket) -> None:
    journal = Journal(journald.getsockname())
    lines = JournalLines(journal, "m@1", "m")
    lines.take(b"x\n" * BURST, 0)
    got = len(messages(journald))
    assert got + journal.dropped == BURST and journal.dropped
    absent = Journal(journald.getsockname() + "-none")
    JournalLines(absent, "m@1", "m").take(b"one\ntwo\n", 0)
    assert absent.dropped == 2


def test_who_prints_without_end_is_cut_off_and_the_journal_is_told_how_much_is_left_out(
    journald: socket.socket,
) -> None:
    journal = Journal(journald.getsockname())
    lines = JournalLines(journal, "m@1", "m")
    sent = []
    for number in range(BURST + 500):
        lines.take(b"%d\n" % number, 0)
        sent += messages(journald)
    assert sent == [str(number) for number in range(BURST)]
    assert (lines.unsaid, journal.dropped) == (500, 500)
    lines.take(b"later\n", INTERVAL_S)
    told, later = messages(journald)
    assert told.startswith("llmosd: 500 lines were left out") and later == "later"
