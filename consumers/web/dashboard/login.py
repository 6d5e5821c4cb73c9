"""Checks of each request (host name, login, read-only, origin of a change) and security headers of each answer."""

from __future__ import annotations

import hmac
import logging
import re
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import urlsplit

from flask import Flask, Response, request
from werkzeug.exceptions import Forbidden, HTTPException, MethodNotAllowed, MisdirectedRequest, Unauthorized

from consumers.settings import DASHBOARD_USER, DashboardSettings, origin_of
from consumers.web.listening import is_own_host
from producers.errors import SettingsError

logger = logging.getLogger(__name__)

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# rq-dashboard compiles its templates in the browser ('unsafe-eval') and uses style attributes ('unsafe-inline'). Among
# inline scripts, only the one of the page's own template may run: the policy contains its hash.
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'{hashes}; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_READONLY = (
    "Nothing was changed: HISTORY_DASHBOARD_READONLY makes this dashboard read-only."
    " To requeue or discard a job, use trading-history failed."
)
_INLINE_SCRIPT = re.compile('<script type="text/javascript">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class Guard:
    """Checks for a Flask app. `local`: only this machine can reach it; `origin`: its public address, if it has one."""

    password: bytes
    local: bool
    origin: str | None
    is_readonly: bool

    @classmethod
    def of(cls, settings: DashboardSettings, *, local: bool) -> Guard:
        """Return the checks that the settings ask for.

        Raises:
            SettingsError: No password is set; there is no default.
        """
        if settings.password is None:
            raise SettingsError(
                "HISTORY_DASHBOARD_PASSWORD is not set: RQ Dashboard shows events and can delete jobs, so it requires a"
                " login"
            )
        origin = settings.url and origin_of(settings.url)
        return cls(settings.password.get_secret_value().encode(), local, origin, settings.is_readonly)

    def protect(self, app: Flask) -> None:
        """Add the checks and the headers to `app`."""
        app.before_request(self._check)
        app.after_request(_with_headers)

    def _check(self) -> None:
        if self.local and not (is_own_host(request.host) or self._is_known(request.host)):
            raise MisdirectedRequest("Unknown host name. Set HISTORY_DASHBOARD_URL to the public address.")
        self._require_login()
        changes = request.url_rule is not None and "POST" in (request.url_rule.methods or ())
        is_safe = request.method in ("GET", "HEAD", "OPTIONS")
        if self.is_readonly and (changes or not is_safe):
            raise Forbidden(_READONLY)
        if changes and request.method != "POST":
            raise MethodNotAllowed(["POST"])
        if not is_safe:
            self._require_own_page()

    def _is_known(self, host: str) -> bool:
        """Return whether `host` is the public host name. Proxies send it with or without the default port."""
        return self.origin is not None and origin_of(f"{self.origin.partition(':')[0]}://{host}") == self.origin

    def _require_login(self) -> None:
        given = request.authorization
        if given is not None and given.type == "basic":
            # Always compare both, so that the response time does not show which one is wrong.
            user = hmac.compare_digest((given.username or "").encode(), DASHBOARD_USER.encode())
            if hmac.compare_digest((given.password or "").encode(), self.password) and user:
                return
            logger.warning("login failed: wrong user or password from %s", request.remote_addr)
        raise Unauthorized("The user or the password is missing or wrong.")

    def _require_own_page(self) -> None:
        """Reject a change that another site made the browser send: the browser adds the login to it."""
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
        own = {origin_of(f"{request.scheme}://{request.host}"), self.origin}
        if (origin is None and site is None) or origin not in (None, *own) or site not in (None, "same-origin"):
            raise Forbidden("Changes must come from a page of this server.")


def _with_headers(response: Response) -> Response:
    response.headers.update(_HEADERS)
    page = response.get_data(as_text=True) if response.mimetype == "text/html" else ""
    hashes = (b64encode(sha256(script.encode()).digest()).decode() for script in _INLINE_SCRIPT.findall(page))
    response.headers["Content-Security-Policy"] = _POLICY.format(hashes="".join(f" 'sha256-{one}'" for one in hashes))
    if response.location:
        response.location = urlsplit(response.location).path  # behind a TLS proxy Flask would write http://
    if response.status_code == Unauthorized.code:
        response.headers["WWW-Authenticate"] = 'Basic realm="RQ Dashboard", charset="UTF-8"'
    if request.endpoint not in ("static", "rq_dashboard.static"):
        response.headers["Cache-Control"] = "no-store"
    return response


def text_answer(error: HTTPException) -> Response:
    """Return an error as one line of text, which the pages' scripts can show. It repeats nothing from the request."""
    response = Response(f"{error.description}\n", error.code, content_type="text/plain; charset=utf-8")
    for name, value in error.get_headers():
        if name == "Allow":
            response.headers[name] = value
    return response
