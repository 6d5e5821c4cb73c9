"""`trading-history import` and `verify`: old history into the tables, and whether it is all there."""

from __future__ import annotations

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

from consumers.cli.options import AsJson, Timezone
from consumers.embedded.stack import stack
from consumers.process_setup import on_stop_signals
from consumers.terminal import print_compared, print_import_statistics, print_json, printable
from producers.errors import HistoryError

if TYPE_CHECKING:
    from datetime import tzinfo

    from consumers.legacy.old_history import ImportSource, OldHistory

_STATEMENT_SECONDS = 20.0  # as a worker has

Directory = Annotated[
    Path | None,
    typer.Argument(help="The folder with portfolio_history.json and signals_archive_*.json.", metavar="DIR"),
]
ForPortfolio = Annotated[
    int | None, typer.Option("--portfolio-id", help="The portfolio of entries that name none; none by default.")
]
ReportFile = Annotated[
    Path, typer.Option("--report", dir_okay=False, help="Where entries go that cannot be taken, one a line.")
]
FromTables = Annotated[bool, typer.Option("--from-tables", help="Read the adopted tables instead of a folder.")]
NanAsNull = Annotated[
    bool,
    typer.Option(
        "--nan-as-null",
        help="Take NaN and Infinity in signals as null, and count them; in amounts they stay refused."
        " verify needs the option if import had it.",
    ),
]
Rate = Annotated[
    int | None,
    typer.Option("--rate", min=1, help="Insert at most so many events a second.", metavar="EVENTS_PER_SECOND"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only read, count and report; inserts nothing.")]


def import_history(  # noqa: PLR0917  # each is an option with a name of its own
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
    """Insert old JSON history into the tables; run again, it adds what is missing.

    Exit status 1 if an entry could not be taken or a file is damaged.
    """
    from consumers.db.engine import limit_statements
    from consumers.legacy.import_report import Report

    _check_place(directory, from_tables)
    with ExitStack() as held:
        if from_tables or not dry_run:
            held.enter_context(stack(database=True))
            limit_statements(_STATEMENT_SECONDS)
        zone = _zone(timezone)
        histories = _histories(directory, zone, portfolio_id, nan_as_null)
        opened = held.enter_context(Report(report))
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
    """Compare old JSON history with the tables, both ways; exit status 1 if anything differs."""
    from consumers.legacy.verification import Verification

    zone = _zone(timezone)
    _check_place(directory, from_tables)
    with stack(database=True):
        histories = _histories(directory, zone, portfolio_id, nan_as_null)
        verification = Verification(histories)
        with _progress([history.import_source for history in histories], "verify") as advance:
            count = _stream(verification.differences(advance), as_json)
    facts = [asdict(one) for one in verification.compared]
    if as_json:
        named = {"files": facts, "unexpected": verification.unexpected, "timezone": _name(zone)}
        sys.stdout.write(f"], {json.dumps(named)[1:]}\n")
    else:
        print_compared(facts)
        if verification.unexpected:
            print(f"{verification.unexpected:,} rows in the tables stand for no entry.")
        print(f"Times without a zone were read in {_name(zone)}.")
        if nan_as_null:
            print("NaN and Infinity in signals were read as null.")
    raise typer.Exit(1 if count else 0)


def _histories(
    directory: Path | None, zone: tzinfo | None, portfolio_id: int | None, nan_as_null: bool
) -> Sequence[OldHistory]:
    from consumers.legacy.old_history import OldHistory

    sources = _import_sources(directory)
    return [OldHistory(source, zone=zone, portfolio_id=portfolio_id, nan_as_null=nan_as_null) for source in sources]


def _check_place(directory: Path | None, from_tables: bool) -> None:
    """Before any server is started for it."""
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
    sources = table_sources(engine())
    if not sources:
        raise HistoryError(
            "there are no adopted tables in the database: trading-history init-db --adopt-legacy makes them"
        )
    return sources


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
    from consumers.legacy.entries_in_progress import EntriesInProgress
    from consumers.legacy.importer import Importer
    from consumers.worker.batch import logger as batch_logger

    if not batch_logger.isEnabledFor(logging.DEBUG):
        batch_logger.setLevel(logging.CRITICAL)  # the report has each rejection, the statistics the rest
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
            _say(f"stopped after {decided:,} entries; run it again to go on")
            raise


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt like Ctrl-C: a SystemExit raised inside the processing of a batch would be taken
    for a defect that an event causes."""
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


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


@contextmanager
def _progress(sources: Sequence[ImportSource], verb: str) -> Iterator[Callable[[], None]]:
    """A bar with rate and time left on a terminal; the block calls what it gets every now and then."""
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
    """Print each as it comes: there may be as many as there are entries."""
    count = 0
    if as_json:
        sys.stdout.write('{"differences": [')
    for count, one in enumerate(differences, 1):
        if as_json:
            facts = asdict(one) | {"fields": [field._asdict() for field in one.fields]}
            sys.stdout.write(("" if count == 1 else ",") + "\n" + json.dumps(facts))
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
