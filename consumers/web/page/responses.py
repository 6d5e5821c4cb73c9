"""How the page's routes answer: compact JSON that is sent only when it has changed, compressed."""

from __future__ import annotations

import gzip
import json
from datetime import date, datetime
from decimal import Decimal
from hashlib import sha256
from typing import Any

from fastapi import Request, Response

# Nothing from elsewhere, nothing inline, no text that becomes markup.
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_WORTH_COMPRESSING_BYTES = 1_000


def answer(request: Request, body: bytes, media_type: str) -> Response:
    """`body`, or 304 for a browser that has it already."""
    tag = f'W/"{sha256(body).hexdigest()[:32]}"'
    headers = SECURITY_HEADERS | {"Cache-Control": "private, no-cache", "ETag": tag, "Vary": "Accept-Encoding"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if len(body) > _WORTH_COMPRESSING_BYTES and "gzip" in request.headers.get("accept-encoding", ""):
        body = gzip.compress(body, compresslevel=6, mtime=0)
        headers["Content-Encoding"] = "gzip"
    return Response(body, media_type=media_type, headers=headers)


def json_answer(request: Request, facts: Any) -> Response:
    """Amounts as exact text, times in UTC as ISO 8601 with offset."""
    body = json.dumps(facts, default=_plain, ensure_ascii=False, separators=(",", ":"))
    return answer(request, body.encode(), "application/json")


def _plain(value: Any) -> str:
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
