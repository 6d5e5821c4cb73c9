"""Query parameters of the API, and the descriptions of its answers in the OpenAPI document."""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from consumers.db.performance import Figures, WorthMeasure
from consumers.web.api.cursor import MAX_LENGTH
from consumers.web.api.problems import MEDIA_TYPE, SCHEMA
from producers.errors import InvalidEvent
from producers.fields import LARGEST_BIGINT, SMALLEST_BIGINT
from producers.settings import ZoneSettings
from producers.times import localized

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000
_MAX_TIME = 40
# In a query string a + that is not written as %2B means a space.
_LOST_PLUS = re.compile(r"(T\S+) (\d\d:?\d\d)$")


def _moment(value: str) -> datetime:
    if len(value) > _MAX_TIME:
        raise ValueError("is not a time such as 2026-11-22T18:02:46+01:00")
    try:
        moment = datetime.fromisoformat(_LOST_PLUS.sub(r"\1+\2", value))
    except ValueError:
        raise ValueError("is not a time such as 2026-11-22T18:02:46+01:00") from None
    try:
        return localized(moment, ZoneSettings.from_environment().timezone, "it").astimezone(UTC)
    except (InvalidEvent, OverflowError, ValueError):
        raise ValueError("is too close to the year 1 or 9999") from None


Moment = Annotated[
    datetime,
    BeforeValidator(_moment),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-11-22T18:02:46+01:00"]}),
]


class _Parameters(BaseModel):
    """Parameters of an endpoint. An unknown one is an error, since ignoring a mistyped filter would mislead."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    portfolio_id: int | None = Field(
        None, ge=SMALLEST_BIGINT, le=LARGEST_BIGINT, description="Only rows of this portfolio.", examples=[1]
    )


class PageParameters(_Parameters):
    """Parameters of every listing."""

    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT, description="Maximum number of rows.", examples=[100])
    since: Moment | None = Field(
        None,
        description="Only rows from this time on. A time without an offset is in the zone HISTORY_TIMEZONE.",
    )
    until: Moment | None = Field(None, description="Only rows before this time.")
    cursor: str | None = Field(
        None, max_length=MAX_LENGTH, description="Take it from the Link header of the previous page."
    )
    format: Literal["json", "csv"] | None = Field(None, description="Overrides the Accept header.")


class StreamParameters(PageParameters):
    """Parameters of the listings that can also be streams of all rows."""

    limit: int | None = Field(  # type: ignore[assignment]  # wider than in PageParameters
        None,
        ge=1,
        le=MAX_LIMIT,
        description=f"Maximum number of rows; by default {DEFAULT_LIMIT}, and as NDJSON all rows.",
        examples=[100],
    )
    format: Literal["json", "csv", "ndjson"] | None = Field(  # type: ignore[assignment]  # as above
        None, description="Overrides the Accept header."
    )


class HistoryParameters(StreamParameters):
    daily: Literal["last"] | None = Field(
        None, description="Only the last snapshot of each date and portfolio, among those between since and until."
    )


class SignalsParameters(PageParameters):
    market_id: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]+$")] = Field(
        examples=["510372"]
    )


class PerformanceParameters(_Parameters):
    since: date | None = Field(None, description="Only closes from this date on.", examples=["2026-01-01"])
    until: date | None = Field(None, description="Only closes before this date.")
    measure: WorthMeasure | None = Field(
        None, description="Measure of the worth; by default chosen from the portfolio's rows."
    )
    risk_free_rate: float = Field(
        0.0, gt=-1, allow_inf_nan=False, description="Risk-free rate of a year; 0.02 is 2 %.", examples=[0.02]
    )
    days_of_a_year: float = Field(365, ge=1, le=366, description="Number of closes that a year has.")


class SnapshotRow(BaseModel):
    """Row of portfolio_history. Amounts are in the account's currency."""

    id: int
    event_id: str
    source: str
    sequence: int | None
    portfolio_id: int | None
    snapshot_date: date
    timestamp: datetime
    balance: float
    total_invested: float
    total_profit_loss: float
    total_value: float
    open_positions: int
    trade_count: int
    created_at: datetime


class ArchiveRow(BaseModel):
    """Row of signal_archives."""

    id: int
    event_id: str
    source: str
    sequence: int | None
    portfolio_id: int | None
    archived_at: datetime
    archive_month: str
    signals_count: int
    signals_data: list[dict[str, Any]]
    created_at: datetime


class SignalRow(BaseModel):
    """Signal of one market. `position` counts from 1 within its archive."""

    archive_id: int
    portfolio_id: int | None
    archived_at: datetime
    position: int
    signal: dict[str, Any]


class PerformanceRow(BaseModel):
    """Performance of one portfolio. `figures` is null if `problem` says why they would be wrong; 0.01 is one per cent.

    profit_loss and net_deposits are changes between the first and the last close.
    """

    portfolio_id: int | None
    measure: WorthMeasure
    closes: int
    first: date | None
    last: date | None
    worth: float | None
    profit_loss: float | None
    net_deposits: float | None
    problem: str | None
    figures: Figures | None


_SIGNAL = {"market_id": "510372", "action": "buy_yes", "yes_price": 0.9995}
_EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {
    SnapshotRow: {
        "id": 42,
        "event_id": "7c1f366e-c9c3-5876-873e-6a33c29b098d",
        "source": "trading-controller/0b5f3c2e9a714d6c8e1f2a3b4c5d6e7f",
        "sequence": 42,
        "portfolio_id": 1,
        "snapshot_date": "2026-11-22",
        "timestamp": "2026-11-22T17:02:46.101234+00:00",
        "balance": 9900.12,
        "total_invested": 100.0,
        "total_profit_loss": 197.25,
        "total_value": 10097.37,
        "open_positions": 1,
        "trade_count": 2,
        "created_at": "2026-11-22T17:02:46.118021+00:00",
    },
    ArchiveRow: {
        "id": 42,
        "event_id": "df9f8830-1521-5249-968e-c97c829a56a7",
        "source": "trading-controller/0b5f3c2e9a714d6c8e1f2a3b4c5d6e7f",
        "sequence": 43,
        "portfolio_id": 1,
        "archived_at": "2026-11-22T17:02:46.101234+00:00",
        "archive_month": "2026-11",
        "signals_count": 1,
        "signals_data": [_SIGNAL],
        "created_at": "2026-11-22T17:02:46.118021+00:00",
    },
    SignalRow: {
        "archive_id": 42,
        "portfolio_id": 1,
        "archived_at": "2026-11-22T17:02:46.101234+00:00",
        "position": 1,
        "signal": _SIGNAL,
    },
}


def answers(row: type[BaseModel], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI descriptions of the answers of an endpoint that lists such rows."""
    example = _EXAMPLES[row]
    headers = {
        "Link": {
            "description": 'Link to the next page, rel="next" (RFC 8288), if there is one.',
            "schema": {"type": "string"},
        },
        "ETag": {
            "description": "Send it as If-None-Match to ask whether the page has changed.",
            "schema": {"type": "string"},
        },
    }
    content: dict[str, dict[str, Any]] = {
        "application/json": {"example": [example]},
        "text/csv": {"schema": {"type": "string"}, "example": ",".join(example) + "\r\n"},
    }
    if streams:
        content["application/x-ndjson"] = {"schema": {"type": "string"}, "example": _line(example)}
    return {
        200: {"description": "One page, newest first.", "headers": headers, "content": content},
        304: {
            "description": "The page has not changed since the answer with the tag in If-None-Match.",
            "headers": headers,
        },
        **problems(401, 414, 422, 503),
    }


def _line(example: dict[str, Any]) -> str:
    """Return the example as NDJSON, in which amounts are text."""
    texts = {name: str(value) if isinstance(value, float) else value for name, value in example.items()}
    return json.dumps(texts) + "\n"


_REASONS = {
    401: "The bearer token is missing or wrong.",
    414: "The query string is too long.",
    422: "A parameter is wrong; `errors` names it and the reason.",
    503: "The database or Redis cannot be read now. Retry-After is in seconds.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI descriptions of these error answers."""
    return {
        status: {"description": _REASONS[status], "content": {MEDIA_TYPE: {"schema": SCHEMA}}} for status in statuses
    }
