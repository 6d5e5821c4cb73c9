"""Writing a file of the old format: completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from consumers.legacy.json_arrays import write_entries
from consumers.legacy.legacy_json import snapshot_entry
from producers.errors import FileNotWritten
from tests.factories import a_snapshot

NAME = "portfolio_history.json"
OLD = "[1]"


def _failing(error: BaseException) -> Iterator[dict[str, Any]]:
    yield {"a": 1}
    raise error


@pytest.mark.parametrize("error", [RuntimeError("gone"), OSError("gone"), KeyboardInterrupt(), SystemExit(143)])
def test_any_failure_while_writing_leaves_only_the_old_file(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / NAME).write_text(OLD)
    with pytest.raises(FileNotWritten if isinstance(error, OSError) else type(error)):
        write_entries(tmp_path / NAME, _failing(error))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {NAME: OLD}


def test_nan_is_an_error_and_no_file_is_written(tmp_path: Path) -> None:
    """JSON does not have it."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_entries(tmp_path / NAME, [{"balance": float("nan")}])
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_a_missing_folder_has_its_path_and_the_reason(tmp_path: Path) -> None:
    with pytest.raises(FileNotWritten, match=f"none/{NAME}: No such file or directory$"):
        write_entries(tmp_path / "none" / NAME, [])


def test_an_array_has_one_entry_a_line_in_ascii(tmp_path: Path) -> None:
    """Amounts look like floats and keep every digit. Counts are integers. An empty array is valid."""
    snapshot = a_snapshot(balance="0.10000001", total_invested=100)
    numbers = [write_entries(tmp_path / name, entries) for name, entries in (("0", []), ("1", [{"ä": "🌉"}, {}]))]
    write_entries(tmp_path / NAME, [snapshot_entry(snapshot, None)])

    assert numbers == [0, 2]
    assert [(tmp_path / name).read_text() for name in ("0", "1")] == [
        "[]\n",
        '[\n{"\\u00e4": "\\ud83c\\udf09"},\n{}\n]\n',
    ]
    assert '"balance": 0.10000001, "total_invested": 100.0, ' in (tmp_path / NAME).read_text()
    (entry,) = json.loads((tmp_path / NAME).read_text(), parse_float=Decimal)
    assert (entry["open_positions"], type(entry["open_positions"])) == (1, int)


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    """Programs of other users can read it as before."""
    (tmp_path / "other").touch()
    write_entries(tmp_path / NAME, [])
    assert (tmp_path / NAME).stat().st_mode == (tmp_path / "other").stat().st_mode
