"""Checks of each request (size, host, token, repeated parameters) and security headers of each answer."""

from __future__ import annotations

import hmac
from functools import lru_cache
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from consumers.settings import ApiSettings
from consumers.web.api.problems import Problem
from consumers.web.listening import is_loopback, is_own_host
from producers.fields import NO_NAME

MAX_QUERY_BYTES = 4096
HEADERS_ONLY = "trading-history.headers-only"  # in the scope of a HEAD request
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_bearer = HTTPBearer(auto_error=False, description="The value of HISTORY_API_TOKEN, if it is set on the server.")


def settings_of(request: Request) -> ApiSettings:
    """Return the settings that the app read at its start. In an app that includes `router`, read the environment."""
    started: ApiSettings | None = getattr(request.app.state, "history_api", None)
    return started or ApiSettings.from_environment()


async def require_token(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> None:
    """Require the bearer token, if one is set.

    Raises:
        Problem: 401, the token is missing or wrong.
    """
    token = settings_of(request).token
    if token is None:
        return
    shown = "" if given is None else given.credentials
    if not hmac.compare_digest(shown.encode(), token.get_secret_value().encode()):
        raise Problem(401, "The bearer token is missing or wrong.", headers={"WWW-Authenticate": "Bearer"})


async def require_once(request: Request) -> None:
    """Require that each parameter is given once.

    Raises:
        Problem: 422, a parameter is given more than once.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if names.count(name) > 1:
            parameter, reason = name or NO_NAME, "is given more than once"
            raise Problem(422, f"{parameter}: {reason}", errors=[{"parameter": parameter, "reason": reason}])


class Guard:
    """ASGI middleware: checks requests and adds security headers that the answer does not set itself.

    The root path of the settings is removed from a request that has it. The root path itself is redirected to the page.
    HEAD is answered like GET, without the body. On loopback without a token, the Host header must be an IP address or
    `localhost`: otherwise a web page could read the API after pointing its own name to 127.0.0.1 (DNS rebinding).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            elif scope["method"] == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        settings = settings_of(Request(scope))
        problem = _problem_with(scope, settings)
        if problem is not None:
            await problem.response()(scope, receive, send_with_headers)
            return
        asked = {**scope, "method": "GET", HEADERS_ONLY: True} if scope["method"] == "HEAD" else dict(scope)
        root_path = scope.get("root_path", "") + (settings.root_path or "")
        if settings.root_path and scope["path"] == root_path:
            await Response(status_code=307, headers={"Location": f"{root_path}/"})(scope, receive, send_with_headers)
            return
        if scope["path"].startswith(f"{root_path}/"):
            asked["root_path"] = root_path
        await _shared(self._app, settings.cors_origins)(asked, receive, send_with_headers)


def _problem_with(scope: Scope, settings: ApiSettings) -> Problem | None:
    if len(scope["query_string"]) > MAX_QUERY_BYTES:
        return Problem(414, f"The query string must have at most {MAX_QUERY_BYTES} bytes.")
    here, _ = scope.get("server") or ("", None)
    if settings.token is None and is_loopback(here) and not is_own_host(Headers(scope=scope).get("host", "")):
        return Problem(
            421, "Unknown host name. Use localhost or an IP address, or set HISTORY_API_TOKEN on the server."
        )
    return None


@lru_cache(maxsize=8)
def _shared(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """Return `app` with CORS headers for web pages of `origins`."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET"],
        allow_headers=["Authorization", "If-None-Match"],
        expose_headers=["ETag", "Link", "Retry-After"],
    )
