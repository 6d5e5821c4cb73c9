"""The read-only HTTP API: `app` to be served, `router` to be included in an app that is there already.

`app` also answers every error with a problem (RFC 9457), guards its answers with headers, and limits every wait for
PostgreSQL; another app that includes `router` has these in its own way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from starlette.responses import JSONResponse, Response

from consumers.db import state_queries
from consumers.db.engine import READ_SECONDS, get_reader
from consumers.db.queries import (
    ARCHIVE_KEYS,
    SIGNAL_KEYS,
    SNAPSHOT_KEYS,
    Listing,
    Narrowing,
    archives,
    closes,
    market_signals,
    snapshots,
)
from consumers.db.waits import DatabaseWaits
from consumers.ops.health import Reading, shared_reader
from consumers.settings import ApiSettings
from consumers.web import page
from consumers.web.api.access import Guard, require_once, require_token
from consumers.web.api.cursor import decode_cursor, encode_cursor
from consumers.web.api.paging import read_page
from consumers.web.api.parameters import (
    ArchiveRow,
    HistoryQuestion,
    Question,
    SignalRow,
    SignalsQuestion,
    SnapshotRow,
    answers,
    problems,
)
from consumers.web.api.problems import ProblemRoute, tell_all_problems, unavailable
from consumers.web.api.scrape import metrics
from consumers.web.disclosure import Unreadable

logger = logging.getLogger(__name__)

_READY_SECONDS = 10.0
_KEYS = {"snapshots": SNAPSHOT_KEYS, "closes": SNAPSHOT_KEYS, "archives": ARCHIVE_KEYS, "signals": SIGNAL_KEYS}

Accept = Annotated[str, Header(include_in_schema=False)]
KnownTags = Annotated[str | None, Header(alias="If-None-Match", max_length=4096)]

router = APIRouter(route_class=ProblemRoute)
_trading = APIRouter(
    prefix="/trading",
    tags=["trading"],
    route_class=ProblemRoute,
    dependencies=[Depends(require_token), Depends(require_once)],
)


@_trading.get("/portfolio-history", response_model=list[SnapshotRow], responses=answers(SnapshotRow))
def portfolio_history(
    request: Request,
    question: Annotated[HistoryQuestion, Query()],
    accept: Accept = "",
    if_none_match: KnownTags = None,
) -> Response:
    """Portfolio snapshots, newest first by snapshot_date, timestamp."""
    kind, listing = ("snapshots", snapshots) if question.daily is None else ("closes", closes)
    return _page(request, question, kind, listing, accept=accept, known_tags=if_none_match)


@_trading.get("/signal-archives", response_model=list[ArchiveRow], responses=answers(ArchiveRow))
def signal_archives(
    request: Request,
    question: Annotated[Question, Query()],
    accept: Accept = "",
    if_none_match: KnownTags = None,
) -> Response:
    """Signal archives, newest first by archived_at. A page ends before `limit` when its signals are many."""
    return _page(request, question, "archives", archives, accept=accept, known_tags=if_none_match)


@_trading.get("/signals", response_model=list[SignalRow], responses=answers(SignalRow))
def signals(
    request: Request,
    question: Annotated[SignalsQuestion, Query()],
    accept: Accept = "",
    if_none_match: KnownTags = None,
) -> Response:
    """Every archived signal of one market, newest first by archived_at."""

    def listing(narrowing: Narrowing) -> Listing:
        return market_signals(question.market_id, narrowing)

    return _page(request, question, "signals", listing, accept=accept, known_tags=if_none_match)


def _page(
    request: Request,
    question: Question,
    kind: str,
    listing: Callable[[Narrowing], Listing],
    *,
    accept: str,
    known_tags: str | None,
) -> Response:
    media_type = _media_type(question.format, accept)
    narrowing = Narrowing(
        portfolio_id=question.portfolio_id,
        since=question.since,
        until=question.until,
        after=None if question.cursor is None else decode_cursor(kind, _KEYS[kind], question.cursor),
    )
    page = read_page(listing, narrowing, question.limit, media_type, known_tags)
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
    """How welcome it is, 0 to 1, by the most specific range of the Accept header that has it."""
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
    # Relative to the server: its name, as proxies and clients have it, is not known here.
    asked = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
    return f"{request.url.path}?{urlencode([*asked, ('cursor', cursor)])}"


@router.get("/healthz", tags=["health"])
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", tags=["health"], responses=problems(503))
def readyz() -> JSONResponse:
    """The database has the tables, and Redis answers if it is set."""
    health = shared_reader(_tables_are_readable, outbox=lambda: None).read(_READY_SECONDS)
    parts: dict[str, Reading[Any]] = {"database": health.database, "redis": health.queue}
    errors = {name: reading.error for name, reading in parts.items() if reading.error is not None}
    for name, error in errors.items():
        if not isinstance(error, Unreadable):
            raise error
        logger.warning("not ready: %s", error if name == "database" else f"Redis: {type(error).__name__}")
    if errors:
        raise unavailable(f"No answer from: {', '.join(errors)}.")
    # Without REDIS_URL this API does not need it.
    return JSONResponse({"status": "ok"} | {name: "ok" for name, one in parts.items() if one.value is not None})


def _tables_are_readable() -> bool:
    with get_reader() as db:
        state_queries.read_history_tables(db)
    return True


@asynccontextmanager
async def _started(app: FastAPI) -> AsyncIterator[None]:
    app.state.history_api = ApiSettings.from_environment()
    try:
        # A server that is frozen but connected sends nothing, not even that a statement took too long.
        with DatabaseWaits(READ_SECONDS + 1, threading.Event()).limited():
            yield
    finally:
        app.state.history_api = None


def create_app() -> FastAPI:
    """A new app; it reads its settings when it is started."""
    made = FastAPI(
        title="trading-history",
        description="Portfolio snapshots and signal archives, read-only.",
        version="1",
        docs_url=None,  # these pages would load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_started,
    )
    made.add_middleware(Guard)
    tell_all_problems(made)
    made.include_router(router)
    made.include_router(metrics, dependencies=[Depends(require_token)])
    made.include_router(page.assets)
    made.include_router(page.data, dependencies=[Depends(require_token), Depends(require_once)])
    return made


router.include_router(_trading)
app: FastAPI = create_app()
