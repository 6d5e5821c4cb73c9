"""Pings of a monitoring service, as a dead man's switch: it alerts if a ping reports a failure, or if none comes.

Healthchecks and compatible services take GET URL as a success, and POST URL/fail with the reason as plain text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pydantic import SecretStr

from consumers.errors import PingNotDelivered
from consumers.ops.probes import Probe, read_side_by_side

PING_SECONDS = 10.0
_ANSWER_SECONDS = 4.0  # of one attempt, for each wait for the network
_PAUSE_SECONDS = 1.0
_MOST_BYTES = 10_000  # services keep this much of a reason, or more
_MOST_READ = 200
_CUT = b"\n(cut)"
_TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
_IGNORED_ANSWERS = ("not found", "rate limited")  # Healthchecks sends these with status 200


def ping(url: SecretStr, problems: Sequence[str]) -> None:
    """Report to the monitoring service that all is well, or the `problems`; try twice, for at most 10 s in all.

    A redirect is followed if only the scheme becomes https, or a slash at the end comes or goes. A proxy of the
    environment is used.

    Raises:
        PingNotDelivered: the service did not accept the ping. The message has the host, but not the URL.
    """
    given = url.get_secret_value()
    request = partial(_request, failure_url(given), _body(problems)) if problems else partial(_request, given)
    (reading,) = read_side_by_side([Probe("ping", partial(_send, request))], PING_SECONDS)
    error = reading.error
    if error is not None:
        # Not chained, and without the message of any other error: it may contain the URL.
        reason = str(error) if isinstance(error, _NotAccepted | TimeoutError) else type(error).__name__
        raise PingNotDelivered(f"the ping to {urlsplit(given).hostname} was not delivered: {reason}") from None


def failure_url(url: str) -> str:
    """Return the URL to which a failure is sent: the path with /fail, the query unchanged."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/fail", fragment=""))


def _body(problems: Sequence[str]) -> bytes:
    body = "\n".join(problems).encode(errors="replace")
    if len(body) <= _MOST_BYTES:
        return body
    return body[: _MOST_BYTES - len(_CUT)].decode(errors="ignore").encode() + _CUT


def _request(url: str, body: bytes | None = None) -> Request:
    headers = {"User-Agent": "trading-history"}
    if body is not None:
        headers["Content-Type"] = "text/plain; charset=utf-8"
    return Request(url, body, headers, method="GET" if body is None else "POST")  # noqa: S310  # http or https


class _SamePlace(HTTPRedirectHandler):
    """Follow a redirect to https or to the same path with or without a slash, with the same method and body.

    Any other redirect is an error: a login page, for example, would accept every ping.
    """

    def redirect_request(  # noqa: PLR0917  # the signature of urllib
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        is_same = (old.hostname, old.path.rstrip("/"), old.query) == (new.hostname, new.path.rstrip("/"), new.query)
        if not is_same or new.scheme not in (old.scheme, "https"):
            raise HTTPError(req.full_url, code, msg, headers, fp)
        body = req.data if isinstance(req.data, bytes) else None
        return _request(newurl, body)


class _NotAccepted(Exception):
    """The service did not accept a ping; the message says why, without the URL."""

    def __init__(self, reason: str, *, may_pass: bool = False) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


def _send(request: Callable[[], Request]) -> None:
    """Send the request, and once more if the reason of the first failure may pass."""
    try:
        _attempt(request())
    except _NotAccepted as error:
        if not error.may_pass:
            raise
        time.sleep(_PAUSE_SECONDS)
        _attempt(request())


def _attempt(request: Request) -> None:
    try:
        with build_opener(_SamePlace).open(request, timeout=_ANSWER_SECONDS) as response:
            answer = _start_of_body(response)
    except HTTPError as error:
        error.close()
        elsewhere = " (a redirect to another place: use its URL)" if 300 <= error.code < 400 else ""
        may_pass = error.code in _TRANSIENT_STATUSES
        raise _NotAccepted(f"HTTP status {error.code}{elsewhere}", may_pass=may_pass) from None
    except (OSError, HTTPException) as error:
        raise _NotAccepted(_reason(error), may_pass=True) from None
    for ignored in _IGNORED_ANSWERS:
        if ignored in answer:
            raise _NotAccepted(f'the service answered "{ignored}"')


def _start_of_body(response: HTTPResponse) -> str:
    """Return the first piece of the body. The status is what counts, so a body that does not come is no failure."""
    try:
        return response.read1(_MOST_READ).decode(errors="replace").lower()
    except (OSError, HTTPException):
        return ""


def _reason(error: OSError | HTTPException) -> str:
    """Return what failed. Messages of http.client may contain the URL, those of the operating system do not."""
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {_ANSWER_SECONDS:g} s"
    if isinstance(cause, OSError):
        return (str(cause.strerror or cause).strip().splitlines() or [type(cause).__name__])[0]
    return type(cause).__name__
