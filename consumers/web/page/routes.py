"""Routes of the page: its files at `/` and `/page/static/`, its data under `/page/`. All are read-only.

Errors are raised: the app answers them as it answers its other errors.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from pathlib import PurePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request, Response
from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field

from consumers.db import archive_queries, curve_queries, portfolio_queries, state_queries
from consumers.db.engine import read_transaction
from consumers.db.measures import Measure
from consumers.db.performance import Rates, WorthMeasure
from consumers.web.page.curve import Curve, curve, daily_changes
from consumers.web.page.page_health import health
from consumers.web.page.responses import MEDIA_TYPES, answer, content, json_answer, known_files
from consumers.web.page.signal_search import MOST_ARCHIVES, Found, Place, find
from producers.fields import LARGEST_BIGINT, SMALLEST_BIGINT

ARCHIVES_AT_ONCE = 50
_END_OF_TIME = datetime(9998, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)  # the latest time that an event may have


def _within_history(moment: datetime) -> datetime:
    if not 1970 <= moment.year <= 9998:
        raise ValueError("must be between 1970 and 9998")
    return moment.astimezone(UTC)


def _first_day(month: str) -> date:
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}", month) or not "1970" <= month[:4] <= "9998":
        raise ValueError("must be a month between 1970-01 and 9998-12")
    return date.fromisoformat(f"{month}-01")


Moment = Annotated[AwareDatetime, AfterValidator(_within_history)]
Id = Annotated[int, Field(ge=0, le=LARGEST_BIGINT)]
PortfolioNumber = Annotated[int, Field(ge=SMALLEST_BIGINT, le=LARGEST_BIGINT)]
PortfolioName = Annotated[
    PortfolioNumber | Literal["none"],
    Query(description="Number of the portfolio, or `none`."),
]
Month = Annotated[date, BeforeValidator(_first_day)]
Wanted = Annotated[str, Query(max_length=100, pattern=r"^[^\x00]*$")]

assets = APIRouter(include_in_schema=False)
data = APIRouter(prefix="/page", include_in_schema=False)


@assets.get("/")
def page(request: Request) -> Response:
    """Return the page."""
    return answer(request, content("index.html"), MEDIA_TYPES[".html"])


@assets.get("/page/static/{name}")
def static_file(request: Request, name: str) -> Response:
    """Return a script, style sheet or icon of the page."""
    if name not in known_files():
        raise HTTPException(404)
    return answer(request, content(name), MEDIA_TYPES[PurePath(name).suffix])


@data.get("/newest")
def newest(request: Request) -> Response:
    """Return a change token per table. The page reads them every 3 s."""
    with read_transaction() as db:
        return json_answer(request, state_queries.change_tokens(db))


@data.get("/portfolios")
def portfolios(request: Request) -> Response:
    """List the portfolios, each with the times of its first and last snapshot."""
    with read_transaction() as db:
        found = [one._asdict() | {"portfolio": _name(one.portfolio)} for one in portfolio_queries.portfolios(db)]
    return json_answer(request, found)


@data.get("/curve")
def equity_curve(
    request: Request,
    *,
    portfolio: PortfolioName,
    measure: Measure | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    buckets: Annotated[int, Query(ge=10, le=1000)] = 400,
    parts: bool = False,
) -> Response:
    """Return the curve between two times, by default the whole curve; see consumers.web.page.curve.

    Without `measure`, it is that of the portfolio's default measure.
    """
    number = _number(portfolio)
    with read_transaction() as db:
        known = portfolio_queries.extent(db, number)
        if known is None:
            raise HTTPException(404, "this portfolio has no snapshots")
        over = curve_queries.Range(since or known.first_at, until or known.last_at, buckets)
        if over.until < over.since:
            raise HTTPException(422, "until is before since")
        usual = portfolio_queries.default_measure(db, number)
        drawn = curve(db, number, over, measure or usual, parts=parts)
    of = {"since": over.since, "until": over.until, "measure": measure or usual, "default_measure": usual}
    return json_answer(request, of | _columns(drawn))


def _columns(drawn: Curve) -> dict[str, Any]:
    rows = [point.snapshot for point in drawn.points]
    return {
        "snapshots": drawn.snapshots,
        "closes_only": drawn.closes_only,
        "at": [row.at for row in rows],
        "worth": [row.worth for row in rows],
        "balance": [row.balance for row in rows],
        "total_invested": [row.total_invested for row in rows],
        "drawdown": [point.drawdown if point.drawdown is None else round(point.drawdown, 6) for point in drawn.points],
        "after_gap": [number for number, point in enumerate(drawn.points) if point.after_gap],
    }


@data.get("/daily")
def daily(request: Request, portfolio: PortfolioName, measure: Measure | None = None) -> Response:
    """Return the close and the change of each date, oldest first; see consumers.web.page.curve."""
    number = _number(portfolio)
    with read_transaction() as db:
        measure = measure or portfolio_queries.default_measure(db, number)
        days = daily_changes(portfolio_queries.daily_closes(db, number, measure))
    facts = {
        "date": [day.close.snapshot_date for day in days],
        "measure": measure,
        "close": [day.close.worth for day in days],
        "change": [day.change for day in days],
        "days": [day.days for day in days],
    }
    return json_answer(request, facts)


@data.get("/performance")
def performance(request: Request, portfolio: PortfolioName, measure: WorthMeasure | None = None) -> Response:
    """Return the performance of a portfolio, the dict of consumers.operations.get_performance with exact amounts."""
    with read_transaction() as db:
        found = portfolio_queries.performance_of(db, _number(portfolio), measure, portfolio_queries.ALL_DATES, Rates())
    return json_answer(request, found.as_dict())


@data.get("/months")
def months(request: Request) -> Response:
    """List the months that have archives and the number of archives of each, newest first."""
    with read_transaction() as db:
        return json_answer(request, archive_queries.months(db))


@data.get("/archives")
def archives(
    request: Request, month: Month, before_at: Moment = _END_OF_TIME, before_id: Id = LARGEST_BIGINT
) -> Response:
    """List at most 50 archives of a month, newest first, and say whether there are older ones."""
    with read_transaction() as db:
        rows = archive_queries.archives_of_month(db, month, (before_at, before_id), ARCHIVES_AT_ONCE + 1)
    named = [row | {"portfolio": _name(row.pop("portfolio_id"))} for row in rows[:ARCHIVES_AT_ONCE]]
    return json_answer(request, {"archives": named, "more": len(rows) > ARCHIVES_AT_ONCE})


@data.get("/signals")
def signals_of_month(
    request: Request,
    *,
    month: Month,
    q: Wanted = "",
    at: Moment = _END_OF_TIME,
    archive: Id = LARGEST_BIGINT,
    number: Id = 0,
) -> Response:
    """List at most 50 signals of a month with the text `q` in a value, newest first, and where to continue."""
    start = Place(at, archive, number)
    with read_transaction() as db:
        rows = archive_queries.archives_with_signals(db, month, (at, archive), MOST_ARCHIVES)
        found = find(rows, q, start)
    return json_answer(request, _found(found))


@data.get("/archives/{archive_id}")
def signals_of_archive(request: Request, archive_id: Id, q: Wanted = "", number: Id = 0) -> Response:
    """List at most 50 signals of one archive with the text `q` in a value, and where to continue."""
    with read_transaction() as db:
        archive = archive_queries.archive(db, archive_id)
    if archive is None:
        raise HTTPException(404, "there is no archive with this id")
    return json_answer(request, _found(find(iter([archive]), q, Place(archive.archived_at, archive.id, number))))


def _found(found: Found) -> dict[str, Any]:
    after = found.after
    return {
        "signals": [one | {"portfolio": _name(one["portfolio"])} for one in found.signals],
        "after": after and {"at": after.archived_at, "archive": after.archive, "number": after.number},
    }


@data.get("/health")
def pipeline_health(request: Request) -> Response:
    """Return the state of the pipeline; see consumers.web.page.page_health."""
    return json_answer(request, health())


def _number(portfolio: int | str) -> int | None:
    return None if portfolio == "none" else int(portfolio)


def _name(portfolio: int | None) -> str:
    return "none" if portfolio is None else str(portfolio)
