"""RQ Dashboard as a server process (`trading-history dashboard`), served by waitress."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn
from urllib.parse import urlsplit

import waitress
from redis import Redis, RedisError
from rq import Queue

from consumers.ops.redis_errors import redis_problem
from consumers.process_setup import on_stop_signals
from consumers.settings import DASHBOARD_USER, DashboardSettings
from consumers.web.dashboard.json_only import forbid_pickle
from consumers.web.dashboard.login import Guard
from consumers.web.listening import is_local, url_of
from producers.settings import TransportSettings

logger = logging.getLogger(__name__)

_THREADS = 4
_MAX_BODY_BYTES = 64 * 1024  # the pages send no bodies
_MAX_ANSWER_BYTES = 64 * 1024 * 1024  # a larger answer would be buffered on disk, which may be read-only


def _report_redis(redis: Redis, queue: str) -> None:
    """Log in one line if Redis cannot be used, which a wrong REDIS_URL shows only at the first request."""
    try:
        redis.exists(Queue.redis_queue_namespace_prefix + queue)
    except RedisError as error:
        logger.error("Redis: %s. Until then, requests are answered with status 503.", redis_problem(error))


def serve(listening: socket.socket) -> NoReturn:
    """Serve RQ Dashboard at a listening socket until a stop signal. Disables pickle in this process.

    Raises:
        SettingsError: HISTORY_DASHBOARD_PASSWORD or REDIS_URL is missing, or a setting is wrong.
    """
    settings, transport = DashboardSettings.from_environment(), TransportSettings.from_environment()
    guard = Guard.of(settings, local=is_local(listening))
    redis = transport.redis()
    forbid_pickle()
    from consumers.web.dashboard.application import create_app

    if not guard.local:
        print("The password is sent unencrypted: put a TLS proxy in front of this server.", file=sys.stderr)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of each request that waits for a thread
    _report_redis(redis, transport.queue)
    app = create_app(guard, redis, transport.queue)
    server = waitress.create_server(
        app,
        sockets=[listening],
        threads=_THREADS,
        ident=None,
        url_prefix=urlsplit(settings.url or "").path.rstrip("/"),  # a proxy may keep or remove this prefix
        max_request_body_size=_MAX_BODY_BYTES,
        outbuf_overflow=_MAX_ANSWER_BYTES,
    )
    ended: list[int] = []

    def end(number: int, _: FrameType | None) -> NoReturn:
        ended.append(number)
        raise SystemExit

    on_stop_signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), end)
    print(
        f"{url_of(listening)} - user {DASHBOARD_USER}, password HISTORY_DASHBOARD_PASSWORD - stop with Ctrl-C",
        flush=True,
    )
    server.run()  # waitress catches the SystemExit
    raise SystemExit(128 + ended[0] if ended else 1)
