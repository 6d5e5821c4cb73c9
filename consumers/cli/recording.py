"""The commands `snapshot` and `archive`, which record like a controller, and `schema`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consumers.cli.options import portfolio_number, seconds_option, time_option
from consumers.embedded.stack import stack
from producers.errors import HistoryError, InvalidEvent, SignalsUnreadable
from producers.fields import type_name

if TYPE_CHECKING:
    from producers.history_producer import HistoryProducer

_DEFAULT_SIGNALS = "data/trades/current_signals.json"
_FROM_OPTIONS = ("portfolio_id", "timestamp", "archived_at")

ForPortfolio = Annotated[
    int | None,
    typer.Option("--portfolio-id", parser=portfolio_number, metavar="NUMBER", help="Number of the portfolio."),
]
Wait = Annotated[
    float,
    typer.Option(
        parser=seconds_option,
        metavar="SECONDS",
        help="Wait at most this many seconds; exit status 1 if the event is not stored then.",
    ),
]


def snapshot(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON file with the controller's portfolio; - reads standard input.")
    ],
    portfolio_id: ForPortfolio = None,
    timestamp: Annotated[
        datetime | None, typer.Option(parser=time_option, metavar="TIME", help="Time of the snapshot; by default now.")
    ] = None,
    wait: Wait = 0,
) -> None:
    """Record one portfolio snapshot, as a controller does.

    Example: trading-history snapshot portfolio.json --portfolio-id 1 --wait 5
    """
    from producers.history_producer import HistoryProducer
    from producers.trading_controller import create_daily_portfolio_snapshot

    portfolio = _read_portfolio(file)
    with stack(redis=True), HistoryProducer() as producer:
        with _input_named(_name_of(file)):
            receipt = create_daily_portfolio_snapshot(portfolio, portfolio_id, timestamp=timestamp, producer=producer)
        _print_receipt(receipt, wait, producer)


def archive(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help=f"JSON file with the signals; by default {_DEFAULT_SIGNALS}."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Read the signals from this URL instead of a file.")] = None,
    portfolio_id: ForPortfolio = None,
    archived_at: Annotated[
        datetime | None,
        typer.Option(parser=time_option, metavar="TIME", help="Time of the trading cycle; by default now."),
    ] = None,
    wait: Wait = 0,
) -> None:
    """Archive the current signals, as a controller does.

    Example: trading-history archive data/trades/current_signals.json --portfolio-id 1 --wait 5
    """
    from producers.history_producer import HistoryProducer
    from producers.trading_controller import archive_current_signals

    if file is not None and not file.exists():
        raise HistoryError(f"{file}: No such file or directory")
    with stack(redis=True), HistoryProducer() as producer:
        chosen: dict[str, Any] = {} if file is None else {"signals_path": file}
        with _input_named("--url" if url else str(file or _DEFAULT_SIGNALS)):
            receipt = archive_current_signals(
                **chosen, signals_url=url, portfolio_id=portfolio_id, archived_at=archived_at, producer=producer
            )
        if receipt is None:
            is_missing = file is None and url is None and not Path(_DEFAULT_SIGNALS).exists()
            print(f"There are no signals to archive{f': {_DEFAULT_SIGNALS} does not exist' if is_missing else ''}.")
        else:
            _print_receipt(receipt, wait, producer)


def schema() -> None:
    """Print the JSON Schema of the events.

    Example: trading-history schema
    """
    from producers.events import json_schema

    print(json.dumps(json_schema(), indent=2))


def _read_portfolio(file: Path) -> dict[str, Any]:
    try:
        # Decimal keeps every digit; a float would not.
        text = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8-sig")
        portfolio = json.loads(text, parse_float=Decimal)
    except OSError as error:
        raise HistoryError(f"{file}: {error.strerror or error}") from error
    except (ArithmeticError, RecursionError, ValueError) as error:
        raise HistoryError(f"{file}: not JSON: {error}") from None
    if not isinstance(portfolio, dict):
        raise HistoryError(f"{_name_of(file)}: must be a JSON object with the portfolio, not {type_name(portfolio)}")
    return portfolio


def _name_of(file: Path) -> str:
    return "standard input" if str(file) == "-" else str(file)


@contextmanager
def _input_named(name: str) -> Iterator[None]:
    """Put the name of the input in front of a message about an event that the block cannot make from it."""
    try:
        yield
    except SignalsUnreadable as error:  # its message names the file already
        raise HistoryError(str(error).replace("signals_url", "--url")) from error
    except InvalidEvent as error:
        raise HistoryError(str(error) if error.field in _FROM_OPTIONS else f"{name}: {error}") from error


def _print_receipt(receipt: Any, wait_seconds: float, producer: HistoryProducer) -> None:
    print(f"accepted event {receipt.event_id} as {receipt.source} {receipt.sequence}")
    if wait_seconds:
        from consumers.ops.outbox_health import unsettled_reason

        try:
            print(f"stored as row {receipt.wait(wait_seconds)}")
        except TimeoutError:
            waited = f"event {receipt.event_id} is not stored after {wait_seconds:g} s, but safe in the outbox."
            later = "run trading-history outbox flush"
            advice = {"if_away": f"When it is back, {later}.", "otherwise": f"To wait longer, {later}."}
            reason = unsettled_reason(producer.damaged_files(), producer.relay_failure(), **advice)
            raise HistoryError(f"{waited} {reason}") from None
