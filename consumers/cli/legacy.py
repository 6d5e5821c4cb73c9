"""`trading-history import` and `verify`: old history into the tables, and whether it is all there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consumers.cli.options import AsJson, Timezone
from consumers.embedded.stack import stack
from consumers.terminal import print_compared, print_json, print_tallies, printable
from producers.errors import HistoryError

if TYPE_CHECKING:
    from datetime import tzinfo

    from consumers.legacy.old_history import OldHistory, Origin

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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only read, count and report; sends nothing.")]


def import_history(  # noqa: PLR0917  # each is an option with a name of its own
    directory: Directory = None,
    from_tables: FromTables = False,
    timezone: Timezone = None,
    portfolio_id: ForPortfolio = None,
    report: ReportFile = Path("import-report.jsonl"),
    nan_as_null: NanAsNull = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Bring old JSON history in, through the queue; run again, it adds what is missing.

    Exit status 1 if an entry could not be taken or a file is damaged.
    """
    from consumers.legacy.import_report import Report

    _check_place(directory, from_tables)
    with ExitStack() as held:
        embedded = False
        if from_tables or not dry_run:
            embedded = held.enter_context(stack(database=True, redis=not dry_run))
        zone = _zone(timezone)
        histories = _histories(directory, zone, portfolio_id, nan_as_null)
        opened = held.enter_context(Report(report))
        if dry_run:
            _look(histories, opened)
        else:
            _carry(histories, opened, embedded)
        _print_tallies(histories, opened, zone, as_json)
    raise typer.Exit(0 if all(history.tally.clean for history in histories) else 1)


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
        with _progress([history.origin for history in histories], "verify") as advance:
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

    origins = _origins(directory)
    return [OldHistory(origin, zone=zone, portfolio_id=portfolio_id, nan_as_null=nan_as_null) for origin in origins]


def _check_place(directory: Path | None, from_tables: bool) -> None:
    """Before any server is started for it."""
    if (directory is None) is not from_tables:
        raise typer.BadParameter("give either a folder or --from-tables", param_hint="DIR")
    if directory is not None and not directory.is_dir():
        raise HistoryError(f"{directory}: {'Not a directory' if directory.exists() else 'No such file or directory'}")


def _origins(directory: Path | None) -> Sequence[Origin]:
    from consumers.db.engine import engine
    from consumers.legacy.legacy_rows import legacy_origins
    from consumers.legacy.old_history import file_origins

    if directory is not None:
        return file_origins(directory)
    origins = legacy_origins(engine())
    if not origins:
        raise HistoryError(
            "there are no adopted tables in the database: trading-history init-db --adopt-legacy makes them"
        )
    return origins


def _zone(timezone: tzinfo | None) -> tzinfo | None:
    from producers.settings import ZoneSettings

    return timezone or ZoneSettings.from_environment().timezone


def _name(zone: tzinfo | None) -> str:
    return "this machine's time zone" if zone is None else str(zone)


def _look(histories: Sequence[OldHistory], report: Any) -> None:
    from consumers.legacy.importer import look

    with _progress([history.origin for history in histories], "read") as advance:
        for history in histories:
            look(history, report, advance)


def _carry(histories: Sequence[OldHistory], report: Any, embedded: bool) -> None:
    from consumers.legacy.importer import Importer
    from producers.settings import TransportSettings

    settings = TransportSettings.from_environment()
    redis = settings.redis()
    with (
        _own_worker(settings.queue) if embedded else nullcontext(),
        _progress([history.origin for history in histories], "import") as advance,
    ):
        importer = Importer(redis, settings.queue, report, say=_say, advance=advance)
        try:
            for history in histories:
                importer.run(history)
        except (KeyboardInterrupt, SystemExit):
            settled = sum(history.tally.settled for history in histories)
            _say(f"stopped after {settled:,} entries; run it again to go on")
            raise


@contextmanager
def _own_worker(queue: str) -> Iterator[None]:
    """On the embedded servers there may be nobody else who would run one."""
    from rq import Queue, Worker

    from consumers.embedded.child_processes import worker_process
    from consumers.embedded.stack import embedded_home
    from producers.settings import TransportSettings

    if Worker.count(queue=Queue(queue, connection=TransportSettings.from_environment().redis())):
        yield
        return
    with worker_process(embedded_home() / "import-worker.log"):
        yield


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


@contextmanager
def _progress(origins: Sequence[Origin], verb: str) -> Iterator[Callable[[], None]]:
    """A bar with rate and time left on a terminal; the block calls what it gets every now and then."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    total = sum(origin.size for origin in origins) if all(origin.size for origin in origins) else None
    in_bytes = all(origin.unit == "bytes" for origin in origins)
    rate = TransferSpeedColumn() if in_bytes else TextColumn("{task.fields[rows]:,} rows")
    columns = (TextColumn(verb), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(verb, total=total, rows=0)

        def advance() -> None:
            done = sum(origin.position() for origin in origins)
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


def _print_tallies(histories: Sequence[OldHistory], report: Any, zone: tzinfo | None, as_json: bool) -> None:
    tallies = [asdict(history.tally) | {"notes": dict(history.tally.notes)} for history in histories]
    written = str(report.path) if report.lines else None
    name = _name(zone)
    if as_json:
        print_json({"files": tallies, "report": written, "timezone": name})
        return
    print_tallies(tallies)
    print(f"Times without a zone were read in {name}.")
    if written:
        print(f"What could not be taken is in {written}.")
