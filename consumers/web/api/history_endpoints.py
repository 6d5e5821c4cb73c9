"""Endpoints under /trading: pages of rows with an ETag and a link to the next, streams of all rows, and performance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Header, Query, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from consumers.db import queries
from consumers.db.archive_queries import ARCHIVE_KEYS, SIGNAL_KEYS, archives, market_signals
from consumers.db.engine import read_transaction
from consumers.db.performance import Rates
from consumers.db.portfolio_queries import SNAPSHOT_KEYS, closes, performances, snapshots
from consumers.db.queries import Filter
from consumers.errors import StoreUnavailable
from consumers.web.api.access import HEADERS_ONLY, require_once, require_token
from consumers.web.api.cursor import decode_cursor, encode_cursor
from consumers.web.api.paging import CSV, JSON, NDJSON, pages, read_page
from consumers.web.api.parameters import (
    DEFAULT_LIMIT,
    MAX_LIMIT,
    ArchiveRow,
    HistoryParameters,
    PageParameters,
    PerformanceParameters,
    PerformanceRow,
    SignalRow,
    SignalsParameters,
    SnapshotRow,
    StreamParameters,
    answers,
    problems,
)
from consumers.web.api.problems import Problem, ProblemRoute
from consumers.web.disclosure import disclosed

_MEDIA_TYPES = {"json": JSON, "csv": CSV, "ndjson": NDJSON}
_KEYS = {"snapshots": SNAPSHOT_KEYS, "closes": SNAPSHOT_KEYS, "archives": ARCHIVE_KEYS, "signals": SIGNAL_KEYS}

Accept = Annotated[str, Header(include_in_schema=False)]
KnownTags = Annotated[str | None, Header(alias="If-None-Match", max_length=4096)]

trading = APIRouter(
    prefix="/trading",
    tags=["trading"],
    route_class=ProblemRoute,
    dependencies=[Depends(require_token), Depends(require_once)],
)


@trading.get("/portfolio-history", response_model=list[SnapshotRow], responses=answers(SnapshotRow, streams=True))
def portfolio_history(
    request: Request,
    parameters: Annotated[HistoryParameters, Query()],
    accept: Accept = "",
    if_none_match: KnownTags = None,
) -> Response:
    """List portfolio snapshots, newest first by snapshot_date and timestamp; as NDJSON without `limit`, all of them."""
    kind, query_of = ("snapshots", snapshots) if parameters.daily is None else ("closes", closes)
    return _page(request, parameters, kind, query_of, accept=accept, known_tags=if_none_match)


@trading.get("/signal-archives", response_model=list[ArchiveRow], responses=answers(ArchiveRow, streams=True))
def signal_archives(
    request: Request,
    parameters: Annotated[StreamParameters, Query()],
    accept: Accept = "",
    if_none_match: KnownTags = None,
) -> Response:
    """List signal archives, newest first by archived_at; as NDJSON without `limit`, all of them.

    A page ends before `limit` at 4 MiB of text.
    """
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
    streams = isinstance(parameters, StreamParameters)
    media_type = _media_type(parameters.format, accept, (JSON, CSV, NDJSON) if streams else (JSON, CSV))
    wanted = Filter(
        portfolio_id=parameters.portfolio_id,
        since=parameters.since,
        until=parameters.until,
        after=None if parameters.cursor is None else decode_cursor(kind, _KEYS[kind], parameters.cursor),
    )
    headers = {"Cache-Control": "private, no-cache", "Vary": "Accept, Authorization"}
    if media_type != JSON:
        extension = "csv" if media_type == CSV else "ndjson"
        name = f"{request.url.path.rpartition('/')[2]}.{extension}"
        headers["Content-Disposition"] = f'attachment; filename="{name}"'
    if media_type == NDJSON and parameters.limit is None:
        return _stream(request, query_of, wanted, headers)
    page = read_page(query_of, wanted, parameters.limit or DEFAULT_LIMIT, media_type, known_tags)
    headers["ETag"] = f'W/"{page.tag}"'
    if page.last is not None:
        headers["Link"] = f'<{_next(request, encode_cursor(kind, page.last))}>; rel="next"'
    if page.body is None:
        return Response(status_code=304, headers=headers)
    return Response(page.body, headers=headers, media_type=media_type)


def _stream(
    request: Request, query_of: Callable[[Filter], queries.Query], wanted: Filter, headers: Mapping[str, str]
) -> Response:
    """Answer with all rows. If a page cannot be read, the chunked answer breaks off without its end.

    Raises:
        Problem: 422, the request is HTTP/1.0, in which every answer ends like one that breaks off.
        StoreUnavailable: the first page cannot be read now.
    """
    if request.scope.get("http_version") == "1.0":
        reason = "is required with HTTP/1.0, which cannot show that an answer is incomplete; or use HTTP/1.1"
        raise Problem(422, f"limit: {reason}", errors=[{"parameter": "limit", "reason": reason}])
    bodies = pages(query_of, wanted, MAX_LIMIT, NDJSON)
    first = next(bodies)
    rest = () if request.scope.get(HEADERS_ONLY) else bodies
    return _Stream(chain([first], rest), headers=headers, media_type=NDJSON)


class _Stream(StreamingResponse):
    """Answer in chunks that is left without its end, with the reason in the log, if the rest cannot be read."""

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except StoreUnavailable as error:
            disclosed(error)


def _media_type(asked: str | None, accept: str, offered: tuple[str, ...]) -> str:
    if asked is not None:
        return _MEDIA_TYPES[asked]
    return max(offered, key=lambda media_type: _quality(accept, media_type))  # the first of equal ones


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
