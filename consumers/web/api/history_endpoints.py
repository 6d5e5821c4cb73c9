"""Endpoints under /trading: pages of rows as JSON or CSV, each with an ETag and a link to the next page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Header, Query, Request
from starlette.responses import Response

from consumers.db import queries
from consumers.db.archive_queries import ARCHIVE_KEYS, SIGNAL_KEYS, archives, market_signals
from consumers.db.engine import read_transaction
from consumers.db.performance import Rates
from consumers.db.portfolio_queries import SNAPSHOT_KEYS, closes, performances, snapshots
from consumers.db.queries import Filter
from consumers.web.api.access import require_once, require_token
from consumers.web.api.cursor import decode_cursor, encode_cursor
from consumers.web.api.paging import read_page
from consumers.web.api.parameters import (
    ArchiveRow,
    HistoryParameters,
    PageParameters,
    PerformanceParameters,
    PerformanceRow,
    SignalRow,
    SignalsParameters,
    SnapshotRow,
    answers,
    problems,
)
from consumers.web.api.problems import ProblemRoute

_KEYS = {"snapshots": SNAPSHOT_KEYS, "closes": SNAPSHOT_KEYS, "archives": ARCHIVE_KEYS, "signals": SIGNAL_KEYS}

Accept = Annotated[str, Header(include_in_schema=False)]
KnownTags = Annotated[str | None, Header(alias="If-None-Match", max_length=4096)]

trading = APIRouter(
    prefix="/trading",
    tags=["trading"],
    route_class=ProblemRoute,
    dependencies=[Depends(require_token), Depends(require_once)],
)


@trading.get("/portfolio-history", response_model=list[SnapshotRow], responses=answers(SnapshotRow))
def portfolio_history(
    request: Request,
    parameters: Annotated[HistoryParameters, Query()],
    accept: Accept = "",
    if_none_match: KnownTags = None,
) -> Response:
    """List portfolio snapshots, newest first by snapshot_date and timestamp."""
    kind, query_of = ("snapshots", snapshots) if parameters.daily is None else ("closes", closes)
    return _page(request, parameters, kind, query_of, accept=accept, known_tags=if_none_match)


@trading.get("/signal-archives", response_model=list[ArchiveRow], responses=answers(ArchiveRow))
def signal_archives(
    request: Request,
    parameters: Annotated[PageParameters, Query()],
    accept: Accept = "",
    if_none_match: KnownTags = None,
) -> Response:
    """List signal archives, newest first by archived_at. A page ends before `limit` at 4 MiB of text."""
    return _page(request, parameters, "archives", archives, accept=accept, known_tags=if_none_match)


@trading.get("/signals", response_model=list[SignalRow], responses=answers(SignalRow))
def signals(
    request: Request,
    parameters: Annotated[SignalsParameters, Query()],
    accept: Accept = "",
    if_none_match: KnownTags = None,
) -> Response:
    """List the archived signals of one market, newest first by archived_at."""

    def query_of(wanted: Filter) -> queries.Query:
        return market_signals(parameters.market_id, wanted)

    return _page(request, parameters, "signals", query_of, accept=accept, known_tags=if_none_match)


@trading.get("/performance", response_model=list[PerformanceRow], responses=problems(401, 414, 422, 503))
def performance(parameters: Annotated[PerformanceParameters, Query()]) -> list[dict[str, Any]]:
    """Return the performance of each portfolio, computed from its daily closes and free of deposits."""
    rates = Rates(risk_free_rate=parameters.risk_free_rate, days_of_a_year=parameters.days_of_a_year)
    with read_transaction() as db:
        found = performances(
            db,
            parameters.portfolio_id,
            since=parameters.since,
            until=parameters.until,
            measure=parameters.measure,
            rates=rates,
        )
    return [one.as_dict() for one in found]


def _page(
    request: Request,
    parameters: PageParameters,
    kind: str,
    query_of: Callable[[Filter], queries.Query],
    *,
    accept: str,
    known_tags: str | None,
) -> Response:
    media_type = _media_type(parameters.format, accept)
    wanted = Filter(
        portfolio_id=parameters.portfolio_id,
        since=parameters.since,
        until=parameters.until,
        after=None if parameters.cursor is None else decode_cursor(kind, _KEYS[kind], parameters.cursor),
    )
    page = read_page(query_of, wanted, parameters.limit, media_type, known_tags)
    headers = {"ETag": f'W/"{page.tag}"', "Cache-Control": "private, no-cache", "Vary": "Accept, Authorization"}
    if page.last is not None:
        headers["Link"] = f'<{_next(request, encode_cursor(kind, page.last))}>; rel="next"'
    if page.body is None:
        return Response(status_code=304, headers=headers)
    if media_type == "text/csv":
        headers["Content-Disposition"] = f'attachment; filename="{request.url.path.rpartition("/")[2]}.csv"'
    return Response(page.body, headers=headers, media_type=media_type)


def _media_type(asked: str | None, accept: str) -> str:
    if asked is not None:
        return "text/csv" if asked == "csv" else "application/json"
    return "text/csv" if _quality(accept, "text/csv") > _quality(accept, "application/json") else "application/json"


def _quality(accept: str, media_type: str) -> float:
    """Return the quality (0 to 1) of a media type, from the most specific range of the Accept header that matches."""
    ranges = {
        name.strip().lower(): parameters for name, _, parameters in (one.partition(";") for one in accept.split(","))
    }
    for name in (media_type, f"{media_type.partition('/')[0]}/*", "*/*"):
        if name in ranges:
            _, found, quality = ranges[name].replace(" ", "").rpartition("q=")
            try:
                return float(quality) if found else 1.0
            except ValueError:
                return 1.0
    return 0.0


def _next(request: Request, cursor: str) -> str:
    # Behind a proxy, the server knows neither the host name nor the whole path that clients use. So the address is
    # relative to the request; it is also right for a client that resolves it against the root of this server.
    asked = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
    path = request.url.path
    return f"{'../' * (path.count('/') - 1)}{path[1:]}?{urlencode([*asked, ('cursor', cursor)])}"
