"""Errors of the API as problem details (RFC 9457). They never contain SQL or the text of a driver's error."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from consumers.web.disclosure import Unreadable, disclosed
from producers.errors import HistoryError
from producers.fields import NO_NAME

RETRY_SECONDS = 2
MEDIA_TYPE = "application/problem+json"
SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"parameter": {"type": "string"}, "reason": {"type": "string"}},
            },
        },
    },
}


class Problem(HistoryError):
    """Error with an HTTP status, headers and members of its problem details."""

    def __init__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = dict(headers or {})
        self.members = members

    def response(self) -> Response:
        """Return the answer with the problem details."""
        body = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status}
        content = json.dumps(body | {"detail": str(self)} | self.members, ensure_ascii=False)
        headers = {"Cache-Control": "no-store"} | self.headers
        return Response(content, self.status, headers, media_type=MEDIA_TYPE)


def unavailable(detail: str) -> Problem:
    """Return a 503 problem that asks the client to try again in 2 s."""
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": str(RETRY_SECONDS)})


def problem_of(error: Exception) -> Problem | None:
    """Return the problem that answers an error; None for an unexpected error."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, Unreadable):
        return unavailable(disclosed(error))
    if isinstance(error, HTTPException):
        status = HTTPStatus(error.status_code)
        detail = status.description if error.detail == status.phrase else error.detail
        return Problem(status, detail, headers=error.headers)
    return None


def _invalid(error: RequestValidationError) -> Problem:
    reasons = [
        {
            "parameter": ".".join(str(step) or NO_NAME for step in one["loc"][1:]) or str(one["loc"][0]),
            "reason": one["msg"].removeprefix("Value error, "),
        }
        for one in error.errors()
    ]
    detail = "; ".join(f"{one['parameter']}: {one['reason']}" for one in reasons[:3])
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, errors=reasons[:20])


class ProblemRoute(APIRoute):
    """Route that answers errors with problem details, also in an app that answers its own errors differently."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_answer(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                problem = problem_of(error)
                if problem is None:
                    raise
                return problem.response()

        return handle_or_answer


async def _answer_error(_: Request, error: Exception) -> Response:
    problem = problem_of(error)
    if problem is None:  # uvicorn logs the error with its traceback
        problem = Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error: the server's log has the traceback.")
    return problem.response()


def add_problem_handlers(app: FastAPI) -> None:
    """Make `app` answer every error with problem details: also an unknown path, a wrong method, an unexpected error."""
    for kind in (HTTPException, RequestValidationError, HistoryError, Exception):
        app.add_exception_handler(kind, _answer_error)
