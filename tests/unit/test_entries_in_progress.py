"""The file of the entries in progress: a crash leaves it behind for the next import."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from consumers.legacy.entries_in_progress import EntriesInProgress
from consumers.legacy.json_arrays import Entry
from producers.errors import HistoryError

SOURCE = "import/a.json/1"
NUMBER = 77  # the entry that crashes the process
CHUNK = [Entry(index, {}) for index in range(100)]


def _crash(report: Path) -> None:
    """Run a child process that exits abruptly while entry NUMBER is in progress."""
    child = os.fork()
    if child == 0:
        with EntriesInProgress(report) as in_progress:
            for portion in in_progress.portions(SOURCE, CHUNK):
                if CHUNK[NUMBER] in portion:
                    os._exit(9)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def _end_with(error: BaseException, report: Path) -> None:
    with EntriesInProgress(report) as in_progress:
        next(in_progress.portions(SOURCE, CHUNK))
        raise error


def _sizes(report: Path, source: str = SOURCE) -> set[int]:
    with EntriesInProgress(report) as in_progress:
        return {len(portion) for portion in in_progress.portions(source, CHUNK)}


def test_each_crash_reduces_the_entries_in_progress_until_one_is_left(tmp_path: Path) -> None:
    """Then its crashes are counted, and the other entries of the chunk are processed together."""
    report = tmp_path / "report.jsonl"
    noted = []
    for _ in range(4):
        _crash(report)
        note = json.loads((tmp_path / "report.jsonl.in-progress").read_text())
        noted.append((note["first"], note["last"], note["crashes"]))
    assert noted == [(0, 99, 0), (75, 77, 0), (77, 77, 0), (77, 77, 1)]
    with EntriesInProgress(report) as in_progress:
        assert in_progress.crashes(SOURCE, NUMBER) == 2
        assert [len(portion) for portion in in_progress.portions(SOURCE, CHUNK)] == [77, 1, 22]


def test_the_note_names_the_portion_before_too_except_after_a_crash(tmp_path: Path) -> None:
    """The import stores a portion while it converts the next. After a crash, it does one after the other."""
    report, noted = tmp_path / "report.jsonl", []
    for after_crash in (False, True):
        if after_crash:
            _crash(report)
        with EntriesInProgress(report) as in_progress:
            assert in_progress.after_crash is after_crash
            for number in (200, 201):
                for _ in in_progress.portions(SOURCE, [Entry(number, {})]):
                    note = json.loads((tmp_path / "report.jsonl.in-progress").read_text())
                    noted.append((note["first"], note["last"]))
    assert noted == [(200, 200), (200, 201), (200, 200), (201, 201)]


@pytest.mark.parametrize("left", ["", "{", "[1]", '{"source": "import/a.json/1", "first": 0}', "null", "\x00" * 10])
def test_an_unreadable_note_is_ignored(tmp_path: Path, left: str) -> None:
    """A full disk may leave such a note."""
    (tmp_path / "report.jsonl.in-progress").write_text(left)
    assert _sizes(tmp_path / "report.jsonl") == {100}


def test_a_note_of_another_source_is_ignored(tmp_path: Path) -> None:
    _crash(tmp_path / "report.jsonl")
    assert _sizes(tmp_path / "report.jsonl", "import/b.json/1") == {100}


def test_an_import_works_without_a_note(tmp_path: Path) -> None:
    """If the report is a pipe, and while another import writes the note."""
    pipe, report = tmp_path / "pipe", tmp_path / "report.jsonl"
    os.mkfifo(pipe)
    assert _sizes(pipe) == {100}
    with EntriesInProgress(report) as first:
        next(first.portions(SOURCE, CHUNK))
        note = (tmp_path / "report.jsonl.in-progress").read_text()
        assert _sizes(report) == {100}
        assert (tmp_path / "report.jsonl.in-progress").read_text() == note
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize(
    ("error", "left"), [(KeyboardInterrupt(), 0), (HistoryError("x"), 0), (OSError(), 0), (MemoryError(), 1)]
)
def test_only_a_crash_or_a_defect_leaves_a_note(tmp_path: Path, error: BaseException, left: int) -> None:
    """A stop signal, or an error that the user can correct, removes it."""
    with pytest.raises(type(error)):
        _end_with(error, tmp_path / "report.jsonl")
    assert len(list(tmp_path.iterdir())) == left
