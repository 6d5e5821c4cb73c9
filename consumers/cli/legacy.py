"""The commands `trading-history import` and `verify`: insert old history, and compare it with the tables."""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from consumers.cli.options import AsJson, Timezone, portfolio_number, row_number
from consumers.embedded.stack import stack
from consumers.errors import StoreUnavailable
from consumers.process_setup import on_stop_signals
from consumers.terminal import print_compared, print_import_statistics, print_json, printable
from producers.errors import HistoryError

if TYPE_CHECKING:
    from datetime import tzinfo

    from consumers.db.formula_changes import PortfolioFormulas
    from consumers.legacy.old_history import ImportSource, OldHistory
    from consumers.legacy.verification import Verification

_STATEMENT_SECONDS = 20.0  # the same as in a worker
_OBJECTS_PER_COLLECTION = 20_000

Directory = Annotated[
    Path | None,
    typer.Argument(help="Folder with portfolio_history.json and signals_archive_*.json.", metavar="DIR"),
]
ForPortfolio = Annotated[
    int | None,
    typer.Option(
        "--portfolio-id",
        parser=portfolio_number,
        metavar="NUMBER",
        help="Portfolio for entries without one; by default they stay without one.",
    ),
]
ReportFile = Annotated[
    Path,
    typer.Option("--report", dir_okay=False, help="File for entries that cannot be imported, one JSON line per entry."),
]
FromTables = Annotated[bool, typer.Option("--from-tables", help="Read the adopted tables instead of a folder.")]
NanAsNull = Annotated[
    bool,
    typer.Option(
        "--nan-as-null",
        help="Import NaN and Infinity in signals as null and count them; in amounts they are always rejected."
        " If import had this option, verify needs it too.",
    ),
]
Rate = Annotated[
    int | None,
    typer.Option(
        "--rate", parser=row_number, help="Insert at most this many events per second.", metavar="EVENTS_PER_SECOND"
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read, count and report, but insert nothing.")]


def import_history(  # noqa: PLR0917  # each parameter is a named option
    directory: Directory = None,
    from_tables: FromTables = False,
    timezone: Timezone = None,
    portfolio_id: ForPortfolio = None,
    report: ReportFile = Path("import-report.jsonl"),
    nan_as_null: NanAsNull = False,
    rate: Rate = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Insert missing entries of old JSON history or adopted tables; exit status 1 if one is rejected or a file damaged.

    Example: trading-history import data/history --timezone Europe/Berlin --portfolio-id 1
    """
    from consumers.db.engine import limit_statements
    from consumers.legacy.import_report import Report

    _check_place(directory, from_tables)
    with ExitStack() as resources:
        if from_tables or not dry_run:
            resources.enter_context(stack(database=True))
            limit_statements(_STATEMENT_SECONDS, long_transactions=True)
        zone = _zone(timezone)
        histories = _histories(directory, zone, portfolio_id, nan_as_null)
        opened = resources.enter_context(Report(report))
        if dry_run:
            _only_read(histories, opened)
        else:
            _import(histories, opened, rate)
        _print_statistics(histories, opened, zone, as_json)
    raise typer.Exit(0 if all(history.statistics.clean for history in histories) else 1)


def verify_history(  # noqa: PLR0917  # as above
    directory: Directory = None,
    from_tables: FromTables = False,
    timezone: Timezone = None,
    portfolio_id: ForPortfolio = None,
    nan_as_null: NanAsNull = False,
    as_json: AsJson = False,
) -> None:
    """Compare old JSON history or adopted tables with the new tables; exit status 1 if anything differs.

    Example: trading-history verify data/history --timezone Europe/Berlin --portfolio-id 1
    """
    from consumers.legacy.verification import Verification

    zone = _zone(timezone)
    _check_place(directory, from_tables)
    with stack(database=True):
        histories = _histories(directory, zone, portfolio_id, nan_as_null)
        verification = Verification(histories)
        with _progress([history.import_source for history in histories], "verify") as advance:
            count = _stream(verification.differences(advance), as_json)
        changes = _formula_changes(verification)
    compared = [asdict(one) for one in verification.compared]
    if as_json:
        named = {"files": compared, "unexpected": verification.unexpected, "timezone": _name(zone)}
        named["formula_changes"] = [
            {"portfolio_id": one.portfolio, "found": one.found, "advice": one.advice} for one in changes
        ]
        sys.stdout.write(f"], {json.dumps(named)[1:]}\n")
    else:
        print_compared(compared)
        if verification.unexpected:
            print(f"{verification.unexpected:,} rows in the tables have no entry in the old history.")
        print(f"Times without a zone were read in {_name(zone)}.")
        if nan_as_null:
            print("NaN and Infinity in signals were read as null.")
        for one in changes:
            print(printable(f"note: {one.found} → {one.advice}"))
    raise typer.Exit(1 if count else 0)


def _formula_changes(verification: Verification) -> list[PortfolioFormulas]:
    """Return the changes of the formula. If the database does not answer now, say so: the comparison is complete."""
    try:
        changes, left_out = verification.formula_changes()
    except StoreUnavailable as error:
        _say(f"the formulas of total_value were not compared: {error}")
        return []
    if left_out:
        _say(f"the formula of total_value was not compared in {left_out:,} more portfolios")
    return changes


def _histories(
    directory: Path | None, zone: tzinfo | None, portfolio_id: int | None, nan_as_null: bool
) -> Sequence[OldHistory]:
    from consumers.legacy.old_history import OldHistory

    sources = _import_sources(directory)
    return [OldHistory(source, zone=zone, portfolio_id=portfolio_id, nan_as_null=nan_as_null) for source in sources]


def _check_place(directory: Path | None, from_tables: bool) -> None:
    """Check the arguments before any server is started."""
    if (directory is None) is not from_tables:
        raise typer.BadParameter("give either a folder or --from-tables", param_hint="DIR")
    if directory is not None and not directory.is_dir():
        raise HistoryError(f"{directory}: {'Not a directory' if directory.exists() else 'No such file or directory'}")


def _import_sources(directory: Path | None) -> Sequence[ImportSource]:
    from consumers.db.engine import engine
    from consumers.legacy.legacy_rows import table_sources
    from consumers.legacy.old_history import file_sources

    if directory is not None:
        return file_sources(directory)
    return table_sources(engine())


def _zone(timezone: tzinfo | None) -> tzinfo | None:
    from producers.settings import ZoneSettings

    return timezone or ZoneSettings.from_environment().timezone


def _name(zone: tzinfo | None) -> str:
    return "this machine's time zone" if zone is None else str(zone)


def _only_read(histories: Sequence[OldHistory], report: Any) -> None:
    from consumers.legacy.importer import dry_run

    with _progress([history.import_source for history in histories], "read") as advance:
        for history in histories:
            dry_run(history, report, advance)


def _import(histories: Sequence[OldHistory], report: Any, rate: int | None) -> None:
    from consumers.db.schema import check_database_now
    from consumers.legacy.entries_in_progress import EntriesInProgress
    from consumers.legacy.importer import Importer
    from consumers.worker.batch import logger as batch_logger

    check_database_now()  # later, the import waits until the database is available
    # A portion has thousands of objects, none of them in cycles: without these, looking for cycles takes a tenth of the
    # processor time.
    gc.freeze()
    gc.set_threshold(_OBJECTS_PER_COLLECTION)

    if not batch_logger.isEnabledFor(logging.DEBUG):
        batch_logger.setLevel(logging.CRITICAL)  # rejections are in the report, and the rest in the statistics
    with (
        _interrupted_by_signals(),
        EntriesInProgress(report.path) as in_progress,
        _progress([history.import_source for history in histories], "import") as advance,
    ):
        try:
            for history in histories:
                Importer(history, report, in_progress, say=_say, advance=advance, rate=rate).run()
        except KeyboardInterrupt:
            decided = sum(history.statistics.decided for history in histories)
            _say(f"stopped after {decided:,} entries; run the same command again to continue")
            raise


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP like Ctrl-C during the block.

    A SystemExit raised while a batch is processed would be counted as a defect that an event causes.
    """
    received: list[int] = []

    def interrupt(number: int, _: object) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    on_stop_signals((signal.SIGTERM, signal.SIGHUP), interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if received:
            raise SystemExit(128 + received[0]) from None
        raise


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def _progress(sources: Sequence[ImportSource], verb: str) -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal. Yields a function that the block calls now and then to update it."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    total = sum(source.size for source in sources) if all(source.size for source in sources) else None
    in_bytes = all(source.unit == "bytes" for source in sources)
    rate = TransferSpeedColumn() if in_bytes else TextColumn("{task.fields[rows]:,} rows")
    columns = (TextColumn(verb), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(verb, total=total, rows=0)

        def advance() -> None:
            done = sum(source.position() for source in sources)
            progress.update(task, completed=done, rows=done)

        yield advance


def _stream(differences: Iterator[Any], as_json: bool) -> int:
    """Print each difference at once, since there may be millions. Returns their number."""
    count = 0
    if as_json:
        sys.stdout.write('{"differences": [')
    for count, one in enumerate(differences, 1):
        if as_json:
            difference = asdict(one) | {"fields": [field._asdict() for field in one.fields]}
            sys.stdout.write(("" if count == 1 else ",") + "\n" + json.dumps(difference))
        else:
            place = f"{one.table} row {one.row_id}" if one.file is None else f"{one.file} entry {one.index}"
            print(printable(f"{one.what}: {place}: {one.reason}"))
    return count


def _print_statistics(histories: Sequence[OldHistory], report: Any, zone: tzinfo | None, as_json: bool) -> None:
    statistics = [asdict(history.statistics) | {"notes": dict(history.statistics.notes)} for history in histories]
    written = str(report.path) if report.lines else None
    name = _name(zone)
    if as_json:
        print_json({"files": statistics, "report": written, "timezone": name})
        return
    print_import_statistics(statistics)
    print(f"Times without a zone were read in {name}.")
    if written:
        print(f"Entries that were not imported are in {written}.")
