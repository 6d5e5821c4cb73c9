"""The same rows as CSV, NDJSON, JSON and Parquet: equal values, one spelling, bounded memory, all rows or none."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.db.inserts import insert_events
from consumers.operations import stream_portfolio_history, stream_signal_archives
from consumers.parquet_files import write_parquet
from producers.errors import FileNotWritten
from producers.events import PortfolioSnapshot, SignalArchive, event_of
from tests.factories import INSTANT, a_signal, a_snapshot, an_archive

pytestmark = pytest.mark.usefixtures("database_url")

PROGRAM = [sys.executable, "-m", "consumers.cli"]
COMMANDS = ("history", "archives")
HOSTILE = '=1+1\r\n"},{"id": 1}\u2028\u2029\x85\x9b31m\x7f\u202e\u0001 ünï🌉 \\u0041 \\'
AMOUNTS = ("balance", "total_invested", "total_profit_loss", "total_value")


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    # The first encoding cannot write the data; it must have no effect. Only --json has the encoding of the terminal.
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8" if "--json" in arguments else "ascii"}
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, timeout=60, check=False, env=environment)


def _output(*arguments: str | Path) -> str:
    run = _run(*arguments)
    assert (run.returncode, run.stderr) == (0, b"")
    return run.stdout.decode()


def _store(*payloads: PortfolioSnapshot | SignalArchive) -> None:
    with get_db() as db:
        insert_events(db, [event_of(one, source="out/1", sequence=n) for n, one in enumerate(payloads)])


def _store_rows_with_extreme_values() -> None:
    _store(
        a_snapshot(balance="-123456789012.00000001", total_invested="0", total_value="999999999999.99999999"),
        a_snapshot(after=timedelta(hours=1), portfolio_id=None, balance="0.00000001", total_value="100"),
        a_snapshot(after=timedelta(hours=2), timestamp=INSTANT.replace(microsecond=0), portfolio_id=2**63 - 1),
        an_archive(signals=[a_signal(reason=HOSTILE, price=Decimal("0.10000000000000000001"), big=10**30)]),
        an_archive(after=timedelta(hours=1), portfolio_id=None, signals=[{HOSTILE: [None, True, {"π": "%s {} $1"}]}]),
    )
    with get_db() as db:  # as somebody else's client may have named it
        db.execute(
            text("UPDATE portfolio_history SET source = :source WHERE portfolio_id IS NULL"), {"source": HOSTILE}
        )


def _exact(text_: str) -> Any:
    return json.loads(text_, parse_float=Decimal)


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose values are text, as Python values."""

    def typed(name: str, value: Any) -> Any:
        if value is None or value == "":
            return None
        if name in AMOUNTS:
            return Decimal(value)
        if name in ("timestamp", "archived_at", "created_at"):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", value)
            return datetime.fromisoformat(value)
        if name == "snapshot_date":
            return date.fromisoformat(value)
        if name == "signals_data":
            return _exact(value) if isinstance(value, str) else value
        return value if name in ("event_id", "source", "archive_month") else int(value)

    return {name: typed(name, value) for name, value in row.items()}


def _of_csv(command: str, folder: Path) -> list[dict[str, Any]]:
    return [_typed(row) for row in csv.DictReader(io.StringIO(_output(command, "--csv"), newline=""))]


def _of_ndjson(command: str, folder: Path) -> list[dict[str, Any]]:
    # splitlines also ends a line at U+0085 and U+2028, as some readers do.
    return [_typed(_exact(line)) for line in _output(command, "--ndjson").splitlines()]


def _of_json(command: str, folder: Path) -> list[dict[str, Any]]:
    return [_typed(row) for row in _exact(_output(command, "--json"))]


def _of_parquet(command: str, folder: Path) -> list[dict[str, Any]]:
    assert re.fullmatch(r"\d rows in .*\n", _output(command, "--parquet", folder / "rows.parquet"))
    rows = pyarrow.parquet.read_table(folder / "rows.parquet").to_pylist()
    return [{name: _exact(v) if name == "signals_data" else v for name, v in row.items()} for row in rows]


def _stored(command: str) -> list[dict[str, Any]]:
    with (stream_portfolio_history if command == "history" else stream_signal_archives)() as exact:
        rows = [dict(zip(exact.columns, row, strict=True)) for row in exact.rows]
    for row in rows:
        row["event_id"] = str(row["event_id"])
        if exact.document:
            row[exact.document] = _exact(row[exact.document])
    return rows


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("rows_of", [_of_csv, _of_ndjson, _of_json, _of_parquet])
def test_each_format_has_the_same_values(
    command: str, rows_of: Callable[[str, Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Every digit, character, null, and the order of rows and columns."""
    _store_rows_with_extreme_values()

    rows = rows_of(command, tmp_path)

    assert rows == _stored(command)
    assert [list(row) for row in rows] == [list(row) for row in _stored(command)]
    if command == "archives":
        assert str(rows[1]["signals_data"][0]["price"]) == "0.10000000000000000001"
        assert rows[1]["signals_data"][0]["reason"] == HOSTILE


def test_amounts_and_times_have_one_spelling_in_all_texts() -> None:
    """Plain digits without trailing zeros, also where Python would write 1E-8; NDJSON quotes them."""
    _store_rows_with_extreme_values()
    in_csv = list(csv.DictReader(io.StringIO(_output("history", "--csv"), newline="")))
    in_ndjson = [json.loads(line) for line in _output("history", "--ndjson").split("\n")[:-1]]
    in_json = json.loads(_output("history", "--json"), parse_float=str, parse_int=str)

    spelled = [[{name: one[name] for name in (*AMOUNTS, "timestamp")} for one in rows] for rows in (in_csv, in_ndjson)]
    assert spelled[0] == spelled[1] == [{name: one[name] for name in spelled[0][0]} for one in in_json]
    assert {one["balance"] for one in in_csv} >= {"-123456789012.00000001", "0.00000001"}
    assert in_csv[0]["total_invested"] == "100"


def test_ndjson_cannot_control_a_terminal_or_end_a_line_early() -> None:
    """Such characters are escaped; letters and emoji are not."""
    _store_rows_with_extreme_values()
    for command in COMMANDS:
        written = _output(command, "--ndjson")
        assert re.search("[^\n -~]", re.sub("[üï🌉ÖüπƐ]", "", written)) is None
        assert "🌉" in written


def test_an_empty_table_is_an_empty_output(tmp_path: Path) -> None:
    """Only Parquet has the columns."""
    for command in COMMANDS:
        assert _output(command, "--ndjson") == ""
        assert _output(command, "--json") == "[]\n"
        assert _output(command, "--parquet", tmp_path / command) == f"0 rows in {tmp_path / command}\n"
        table = pyarrow.parquet.read_table(tmp_path / command)
        assert (table.num_rows, table.column_names[:2]) == (0, ["id", "event_id"])


def test_the_types_of_a_parquet_file_are_exact(tmp_path: Path) -> None:
    """Also if a column has only nulls."""
    _store(a_snapshot(portfolio_id=None), an_archive(portfolio_id=None))
    types: dict[str, str] = {}
    for command in COMMANDS:
        _output(command, "--parquet", tmp_path / command)
        types |= {one.name: str(one.type) for one in pyarrow.parquet.read_schema(tmp_path / command)}
    assert {types[name] for name in AMOUNTS} == {"decimal128(20, 8)"}
    assert {types[name] for name in ("timestamp", "archived_at", "created_at")} == {"timestamp[us, tz=UTC]"}
    assert (types["snapshot_date"], types["portfolio_id"], types["signals_data"]) == ("date32[day]", "int64", "string")


def test_filters_and_the_limit_work_in_each_format(tmp_path: Path) -> None:
    """There is no limit by default, except with --json."""
    hours = [datetime(2026, 1, 1, hour, tzinfo=UTC) for hour in range(24)]
    _store(*(a_snapshot(timestamp=hour, portfolio_id=portfolio) for hour in hours for portfolio in (1, 2)))
    chosen = ("--portfolio-id", "2", "--since", "2026-01-01T10:00:00", "--until", "2026-01-01T20:00:00")
    for options, number in (((), 48), (("-n", "3"), 3), (chosen, 10)):
        assert _output("history", "--ndjson", *options).count("\n") == number
        assert len(json.loads(_output("history", "--json", *options))) == min(number, 20)
        assert _output("history", "--parquet", tmp_path / "f", *options) == f"{number} rows in {tmp_path / 'f'}\n"


def test_two_formats_are_wrong_usage(tmp_path: Path) -> None:
    """The error is one line, and no file is written."""
    forms = (["--csv"], ["--json"], ["--ndjson"], ["--parquet", str(tmp_path / "f")])
    for command in COMMANDS:
        for number, one in enumerate(forms):
            for other in forms[number + 1 :]:
                run = _run(command, *one, *other)
                assert (run.returncode, run.stdout, run.stderr.count(b"\n")) == (2, b"", 1)
                assert re.search(rb"give only one of --\w+, --\w+; see", run.stderr)
                assert {one[0].encode(), other[0].encode()} <= set(re.findall(rb"--\w+", run.stderr))
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow_parquet_names_the_extra(tmp_path: Path) -> None:
    """One line, before anything is read or started."""
    program = "import sys; sys.modules['pyarrow'] = None; from consumers.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", program, "history", "--parquet", str(tmp_path / "f")], capture_output=True, check=False
    )
    assert (run.returncode, run.stderr.decode()) == (
        1,
        "error: this command needs the extra [parquet]: run pip install '.[parquet]' in a clone of trading-history\n",
    )


def test_a_parquet_file_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    """A failure leaves the old file and nothing else. A symbolic link and the permissions are kept."""
    file, link = tmp_path / "rows.parquet", tmp_path / "link"
    file.write_bytes(b"old")
    link.symlink_to(file)
    _store(a_snapshot())

    def fails() -> Iterator[Any]:
        yield from rows
        raise FileNotWritten(tmp_path, OSError("the connection is lost"))

    with stream_portfolio_history() as exact:
        rows = list(exact.rows)
    with pytest.raises(FileNotWritten):
        write_parquet(file, exact.columns, fails())
    assert (file.read_bytes(), sorted(tmp_path.iterdir())) == (b"old", [link, file])

    assert write_parquet(link, exact.columns, rows) == 1
    assert link.is_symlink()
    assert pyarrow.parquet.read_table(file).num_rows == 1
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert sorted(tmp_path.iterdir()) == [link, file]


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_a_parquet_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A folder, a device, and a folder that does not exist."""
    _store(a_snapshot())
    for file, reason in (
        (tmp_path, "cannot be replaced: not a regular file"),
        (Path("/dev/null"), "cannot be replaced: not a regular file"),
        (tmp_path / "no" / "f", "No such file or directory"),
    ):
        run = _run("history", "--parquet", file)
        assert (run.returncode, run.stderr.decode()) == (1, run.stderr.decode().splitlines()[0] + "\n")
        assert run.stderr.decode().startswith(f"error: {file}")
        assert reason in run.stderr.decode()


_PEAK = """
import resource, sys
from consumers.cli import main
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


@pytest.mark.parametrize("form", ["--csv", "--ndjson", "--parquet"])
def test_memory_does_not_grow_with_the_number_of_rows(form: str, tmp_path: Path) -> None:
    """120,000 rows, and 400 archives with 120 MB of signals, need at most 90 MiB more than 100 rows do."""
    with get_db() as db:
        db.execute(
            text("""
                INSERT INTO portfolio_history (event_id, source, snapshot_date, "timestamp", balance, total_invested,
                    total_profit_loss, total_value, open_positions, trade_count)
                SELECT gen_random_uuid(), 'many/1', '2026-01-01', timestamptz '2026-01-01Z' + n * interval '1 second',
                    n / 7.0, n / 11.0, n / 13.0, n / 17.0, 1, n
                FROM generate_series(1, 120000) AS n
            """)
        )
        db.execute(
            text("""
                INSERT INTO signal_archives (event_id, source, archived_at, archive_month, signals_count, signals_data)
                SELECT gen_random_uuid(), 'many/1', timestamptz '2026-01-01Z' + n * interval '1 second', '2026-01', 1,
                    jsonb_build_array(jsonb_build_object('n', n, 'reason', repeat('x', 300000)))
                FROM generate_series(1, 400) AS n
            """)
        )
    target = [str(tmp_path / "rows")] if form == "--parquet" else []

    def peak(command: str, limit: int) -> int:
        run = subprocess.run(
            [sys.executable, "-c", _PEAK, command, form, *target, "-n", str(limit)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=True,
            timeout=100,
        )
        return int(run.stderr)

    assert peak("history", 120_000) - peak("history", 100) < 90
    assert peak("archives", 400) - peak("archives", 1) < 90
    if target:
        groups = pyarrow.parquet.ParquetFile(tmp_path / "rows")
        assert groups.metadata.num_rows == 1
