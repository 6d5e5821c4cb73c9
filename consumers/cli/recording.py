"""The commands `snapshot` and `archive`, which record like a controller, and `schema`."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from consumers.cli.options import time_option
from consumers.embedded.stack import stack
from producers.errors import HistoryError

ForPortfolio = Annotated[int | None, typer.Option("--portfolio-id", help="Number of the portfolio.")]


def snapshot(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON file with the controller's portfolio; - reads standard input.")
    ],
    portfolio_id: ForPortfolio = None,
    timestamp: Annotated[
        datetime | None, typer.Option(parser=time_option, metavar="TIME", help="Time of the snapshot; by default now.")
    ] = None,
    wait: Annotated[
        float,
        typer.Option(min=0, help="Wait at most this many seconds; exit status 1 if the event is not stored then."),
    ] = 0,
) -> None:
    """Record one portfolio snapshot, as a controller does.

    Example: trading-history snapshot portfolio.json --portfolio-id 1 --wait 5
    """
    from producers.history_producer import HistoryProducer
    from producers.trading_controller import create_daily_portfolio_snapshot

    portfolio = _read_portfolio(file)
    with stack(redis=True), HistoryProducer() as producer:
        receipt = create_daily_portfolio_snapshot(portfolio, portfolio_id, timestamp=timestamp, producer=producer)
        _print_receipt(receipt, wait)


def archive(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="JSON file with the signals; by default data/trades/current_signals.json."
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Read the signals from this URL instead of a file.")] = None,
    portfolio_id: ForPortfolio = None,
    archived_at: Annotated[
        datetime | None,
        typer.Option(parser=time_option, metavar="TIME", help="Time of the trading cycle; by default now."),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(min=0, help="Wait at most this many seconds; exit status 1 if the event is not stored then."),
    ] = 0,
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
        receipt = archive_current_signals(
            **chosen, signals_url=url, portfolio_id=portfolio_id, archived_at=archived_at, producer=producer
        )
        if receipt is None:
            print("There are no signals to archive.")
        else:
            _print_receipt(receipt, wait)


def schema() -> None:
    """Print the JSON Schema of the events.

    Example: trading-history schema
    """
    from producers.events import json_schema

    print(json.dumps(json_schema(), indent=2))


def _read_portfolio(file: Path) -> Any:
    try:
        # Decimal keeps every digit; a float would not.
        return json.loads(sys.stdin.read() if str(file) == "-" else file.read_text("utf-8-sig"), parse_float=Decimal)
    except OSError as error:
        raise HistoryError(f"{file}: {error.strerror or error}") from error
    except (ArithmeticError, RecursionError, ValueError) as error:
        raise HistoryError(f"{file}: not JSON: {error}") from None


def _print_receipt(receipt: Any, wait_seconds: float) -> None:
    print(f"accepted event {receipt.event_id} as {receipt.source} {receipt.sequence}")
    if wait_seconds:
        try:
            print(f"stored as row {receipt.wait(wait_seconds)}")
        except TimeoutError as error:
            raise HistoryError(str(error)) from None
