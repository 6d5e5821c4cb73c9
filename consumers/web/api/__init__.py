"""The read-only HTTP API: serve `app`, or include `router` in an app of your own.

`app` also answers every error with problem details (RFC 9457), sets security headers, and limits the waits for
PostgreSQL. An app that includes `router` does these three itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.responses import JSONResponse

from consumers.db import state_queries
from consumers.db.engine import READ_SECONDS, read_transaction
from consumers.db.waits import DatabaseWaits
from consumers.ops.health import shared_reader
from consumers.ops.probes import Reading
from consumers.settings import ApiSettings
from consumers.web import page
from consumers.web.api.access import Guard, require_once, require_token
from consumers.web.api.history_endpoints import trading
from consumers.web.api.parameters import problems
from consumers.web.api.problems import ProblemRoute, add_problem_handlers, unavailable
from consumers.web.api.scrape import metrics
from consumers.web.disclosure import Unreadable

logger = logging.getLogger(__name__)

_READY_SECONDS = 10.0

router = APIRouter(route_class=ProblemRoute)


@router.get("/healthz", tags=["health"])
async def healthz() -> dict[str, str]:
    """Answer as long as the process runs."""
    return {"status": "ok"}


@router.get("/readyz", tags=["health"], responses=problems(503))
def readyz() -> JSONResponse:
    """Check that the tables can be read and, if REDIS_URL is set, that Redis answers."""
    health = shared_reader(check_tables_now, outbox=lambda: None).read(_READY_SECONDS)
    parts: dict[str, Reading[Any]] = {"database": health.database, "redis": health.queue}
    errors = {name: reading.error for name, reading in parts.items() if reading.error is not None}
    for name, error in errors.items():
        if not isinstance(error, Unreadable):
            raise error
        logger.warning("not ready: %s", error if name == "database" else f"Redis: {type(error).__name__}")
    if errors:
        raise unavailable(f"Not readable: {', '.join(errors)}.")
    # Without REDIS_URL there is no value for Redis.
    return JSONResponse({"status": "ok"} | {name: "ok" for name, one in parts.items() if one.value is not None})


def check_tables_now() -> bool:
    """Return true if the tables can be read.

    Raises:
        HistoryError: they cannot be read now, or the settings name no database.
    """
    with read_transaction() as db:
        state_queries.check_tables_readable(db)
    return True


@asynccontextmanager
async def _started(app: FastAPI) -> AsyncIterator[None]:
    app.state.history_api = ApiSettings.from_environment()
    try:
        # A PostgreSQL server that is frozen but connected sends nothing, not even a statement timeout.
        with DatabaseWaits(READ_SECONDS + 1, threading.Event()).limited():
            yield
    finally:
        app.state.history_api = None


def create_app() -> FastAPI:
    """Return a new app. It reads its settings when it starts."""
    made = FastAPI(
        title="trading-history",
        description="Portfolio snapshots and signal archives, read-only.",
        version="1",
        docs_url=None,  # FastAPI's pages load their scripts from other sites
        redoc_url=None,
        redirect_slashes=False,
        servers=[{"url": "."}],  # relative to the address of the document, which a proxy may serve under a path
        root_path_in_servers=False,
        lifespan=_started,
    )
    made.add_middleware(Guard)
    add_problem_handlers(made)
    made.include_router(router)
    made.include_router(metrics, dependencies=[Depends(require_token)])
    made.include_router(page.assets)
    made.include_router(page.data, dependencies=[Depends(require_token), Depends(require_once)])
    return made


router.include_router(trading)
app: FastAPI = create_app()
