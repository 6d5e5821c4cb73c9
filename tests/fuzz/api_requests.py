"""Target `api`: bytes as a request, through the server's own connection class, the app and a real PostgreSQL.

The first line is method and target, each other line a header; an empty line ends the request. `cursor=~TEXT` becomes a
cursor with this text and the right check sum, which a client can compute. Invariants: an answer, and no more answers
than requests, never a status of 5xx, within 5 s of CPU time. An answer 422 names a parameter. The link to the next page
leads to a page.
"""

from __future__ import annotations

import asyncio
import base64
import csv
import io
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import blake2b
from typing import Any
from urllib.parse import urljoin, urlsplit

import uvicorn
from uvicorn.server import ServerState

from consumers.db.inserts import insert_event
from consumers.web.api import app
from consumers.web.api.api_server import BoundedHead
from producers.events import event_of
from tests.factories import a_signal, a_snapshot, an_archive
from tests.fuzz.invariants import require

_HOST = b"host: localhost\r\n"
_CPU_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
_CURSOR = re.compile(rb"cursor=~([^& \n]*)")
_TARGETS = """
/trading/portfolio-history
/trading/portfolio-history?limit=2
/trading/portfolio-history?limit=1&daily=last
/trading/portfolio-history?since=2026-11-22T18:02:46+01:00&until=2027-01-01
/trading/portfolio-history?since=2026-11-22T18:02:46%2B01:00:30&until=2026-11-23T00:00:00-03:30:15
/trading/portfolio-history?since=0001-01-01T00:00:00%2B01:00:30&limit=2
/trading/portfolio-history?portfolio_id=-1&format=csv
/trading/portfolio-history?format=json&since=0001-01-01
/trading/portfolio-history?limit=1001
/trading/portfolio-history?daily=first&x=1
/trading/portfolio-history?cursor=abc
/trading/portfolio-history?limit=1&cursor=~["snapshots","2026-11-22",1795366800000000,2]
/trading/portfolio-history?limit=1&daily=last&cursor=~["closes","2026-11-22",1795366800000000,-9223372036854775808]
/trading/signal-archives
/trading/signal-archives?limit=1&format=csv
/trading/signal-archives?until=9999-12-31T23:59:59-12:00
/trading/signal-archives?since=2026-11-22T18:02:46-00:00:01&until=9999-12-31T23:59:59-23:59:59
/trading/signal-archives?portfolio_id=9223372036854775808
/trading/signal-archives?limit=2&limit=3
/trading/signal-archives?limit=1&cursor=~["archives",1795366800000000,2]
/trading/signals
/trading/signals?market_id=510372
/trading/signals?market_id=%00
/trading/signals?market_id=%F0%9F%98%80&format=csv
/trading/signals?limit=1&market_id=510372&cursor=~["signals",1795366800000000,2,1]
/
/healthz
/readyz
/metrics
/openapi.json
/nowhere
/page/newest
/page/portfolios
/page/curve?portfolio=1
/page/curve?portfolio=none&buckets=10&parts=true
/page/curve?portfolio=1&since=2026-11-22T00:00:00Z&until=1970-01-01T00:00:00Z
/page/curve?portfolio=1&since=2026-11-22T00:00:00%2B01:00:30&until=2026-12-01T00:00:00-11:59:59
/page/daily?portfolio=1
/page/daily?portfolio=none
/page/daily?portfolio=-9223372036854775808
/page/months
/page/archives?month=2026-11
/page/archives?month=9998-12&before_at=1970-01-01T00:00:00Z&before_id=0
/page/archives?month=2026-13
/page/signals?month=2026-11&q=br%C3%BCcke
/page/archives?month=2026-11&before_at=2026-11-22T18:00:00-05:00:30&before_id=2
/page/signals?month=1970-01&q=&at=2026-11-22T00:00:00Z&archive=1&number=1
/page/archives/1
/page/archives/1?q=%22%5C
/page/archives/1?number=9223372036854775807
/page/archives/1?q=%00
/page/health
/page/static/page.js
/page/static/uplot.js
""".strip().splitlines()
_HEADERS = (
    *("accept: text/csv", "accept: text/csv;q=0.5, */*;q=nan", 'if-none-match: W/"3-0"', "if-none-match: *"),
    *("accept-encoding: gzip", "host: example.org", "host: [::1]:80", "authorization: Bearer x"),
    *("origin: https://example.org", "connection: close", "content-length: 0", "range: bytes=0-1"),
    *("transfer-encoding: chunked", "expect: 100-continue", "upgrade: websocket"),
)
_METHODS = ("HEAD", "POST", "OPTIONS", "PUT", "TRACE", "PATCH", "DELETE")


def seeds() -> Iterator[bytes]:
    """Yield requests of each path with usual and wrong parameters and headers, and cursors of real pages."""
    yield from (f"GET {target}".encode() for target in _TARGETS)
    for header in _HEADERS:
        yield f"GET /trading/portfolio-history?limit=2\n{header}".encode()
        yield f"GET /page/portfolios\n{header}".encode()
    for method in _METHODS:
        yield f"{method} /trading/signals?market_id=1\norigin: https://example.org".encode()
    yield b"GET /healthz\n\nGET /trading/signals?market_id=1\n\n"
    for path in ("portfolio-history?limit=1", "signal-archives?limit=1", "signals?market_id=510372&limit=1"):
        (answer,) = _answers(f"GET /trading/{path}".encode())
        yield f"GET {urljoin('/trading/', answer.next or '')}".encode()
        yield f"GET /trading/{path}\nif-none-match: {answer.headers['etag']}".encode()


class _Answer:
    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(status.split(" ")[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        link = re.fullmatch('<(.*)>; rel="next"', self.headers.get("link", ""))
        self.next = link[1] if link else None


class _Transport(asyncio.Transport):
    """Connection that keeps what the server writes; each write of a head begins an answer."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("127.0.0.1", 8000), "peername": ("127.0.0.1", 4)})
        self.answers: list[bytes] = []
        self._closing = False

    def write(self, data: Any) -> None:
        if self._closing:  # a real connection sends nothing more
            return
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self.answers.append(data)
        elif self.answers:
            self.answers[-1] += data

    def close(self) -> None:
        self._closing = True

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        require(False, "the connection becomes a web socket")


class _Server:
    """The app as `trading-history api` serves it, in this thread, with rows in its database."""

    def __init__(self) -> None:
        _record_rows()
        self.errors: list[BaseException] = []
        logging.getLogger("uvicorn.error").addFilter(self._keep_error)
        self._loop = asyncio.new_event_loop()
        self._config = uvicorn.Config(app, http=BoundedHead, log_config=None, access_log=False, server_header=False)
        self._stack = AsyncExitStack()
        self._loop.run_until_complete(self._stack.enter_async_context(app.router.lifespan_context(app)))

    def stop(self) -> None:
        logging.getLogger("uvicorn.error").removeFilter(self._keep_error)
        self._loop.run_until_complete(self._stack.aclose())
        self._loop.close()

    def _keep_error(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            self.errors.append(record.exc_info[1])
        return False

    def answers(self, raw: bytes) -> list[bytes]:
        self.errors.clear()
        return self._loop.run_until_complete(self._answers(raw))

    async def _answers(self, raw: bytes) -> list[bytes]:
        state, transport = ServerState(), _Transport()
        protocol = BoundedHead(self._config, state, {})
        protocol.connection_made(transport)
        protocol.data_received(raw)
        while state.tasks:
            done, _ = await asyncio.wait(state.tasks, timeout=_ANSWER_SECONDS)
            require(done, f"no answer within {_ANSWER_SECONDS:g} s")
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        return transport.answers


def _record_rows() -> None:
    start = datetime(2026, 11, 22, 17, tzinfo=UTC)
    for number in range(6):
        moment = start + timedelta(hours=9 * number)
        portfolio = (1, 1, 1, 1, None, -(2**63))[number]
        insert_event(
            event_of(
                a_snapshot(timestamp=moment, snapshot_date=moment.date(), portfolio_id=portfolio),
                source="a",
                sequence=number,
            )
        )
        signals = [a_signal(market_id=str(510372 - n % 2), text="=1+1\r\n\u2028🌉" * n) for n in range(number + 1)]
        insert_event(
            event_of(
                an_archive(archived_at=moment, signals=signals, portfolio_id=portfolio), source="b", sequence=number
            )
        )


@cache
def _server() -> _Server:
    return _Server()


def stop() -> None:
    """Stop the server, so that another one may start with another database."""
    _server().stop()
    _server.cache_clear()


def _answers(data: bytes) -> list[_Answer]:
    return [_Answer(raw) for raw in _server().answers(_request(data))]


def _request(data: bytes) -> bytes:
    """Return the bytes on the connection: HTTP/1.1, and a Host header unless the request has one."""
    requests = []
    for one in _CURSOR.sub(_signed, data).split(b"\n\n"):
        first, *headers = one.split(b"\n")
        host = b"" if any(line.lower().startswith(b"host:") for line in headers) else _HOST
        requests.append(first + b" HTTP/1.1\r\n" + host + b"".join(line + b"\r\n" for line in headers) + b"\r\n")
    return b"".join(requests)


def _signed(found: re.Match[bytes]) -> bytes:
    check_sum = blake2b(found[1], digest_size=4).digest()
    return b"cursor=" + base64.urlsafe_b64encode(check_sum + found[1]).rstrip(b"=")


def check(data: bytes, *, store: bool) -> None:
    """Send `data` and check each answer."""
    started = time.process_time()
    found = _answers(data)
    if errors := _server().errors:
        raise errors[0]
    require(found, "no answer")
    # An answer may end the connection, so there may be fewer. A carriage return may begin another request.
    requests = data.count(b"\n\n") + 1
    require(len(found) <= requests or b"\r" in data, f"{len(found)} answers to {requests} requests")
    for answer in found:
        _check_answer(answer, data)
    used = time.process_time() - started
    require(used < _CPU_SECONDS, f"{used:.1f} s of CPU time")


def _check_answer(answer: _Answer, data: bytes) -> None:
    require(answer.status < 500, f"status {answer.status}: {answer.body[:300]!a}")
    kind = answer.headers.get("content-type", "")
    is_head = b"HEAD " in data
    if kind == "application/problem+json" and not is_head:
        _check_problem(answer, json.loads(answer.body))
    elif (
        kind == "application/json" and not is_head and "content-encoding" not in answer.headers and answer.status == 200
    ):
        json.loads(answer.body)
    elif kind.startswith("text/csv") and not is_head:
        rows = list(csv.reader(io.StringIO(answer.body.decode())))
        require({len(row) for row in rows} == {len(rows[0])}, "rows of the CSV have different lengths")
    if answer.next is not None and answer.status == 200 and b"\n" not in data and data.startswith(b"GET "):
        _check_next(answer, data[4:])


def _check_problem(answer: _Answer, problem: Any) -> None:
    require(problem["status"] == answer.status and problem["title"], "a problem has no status or title")
    if answer.status == 422:
        named = [one["parameter"] for one in problem.get("errors", ())]
        require(
            all(named) and (named or problem["detail"] == "until is before since"), f"no parameter is named: {problem}"
        )
        begins = not named or str(problem["detail"]).startswith(named[0])
        require(begins, f"the detail does not begin with the parameter: {problem}")


def _check_next(answer: _Answer, target: bytes) -> None:
    shown = target.decode("latin-1")
    following = urlsplit(urljoin(urlsplit(shown).path or "/", answer.next or ""))
    (page,) = _answers(f"GET {following.path}?{following.query}".encode())
    require(page.status == 200, f"the link to the next page answers {page.status}: {page.body[:200]!a}")
    require(page.body != answer.body, "the next page is the same page")
