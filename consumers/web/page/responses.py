"""Answers of the page's routes: its files, and compact JSON; compressed, and only when they have changed.

The files are our own beside this module, and uPlot's out of the wheel that carries them.
"""

from __future__ import annotations

import gzip
import json
from datetime import date, datetime
from decimal import Decimal
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
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
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_OURS = Path(__file__).with_name("static")
# Of youplot only these two files are used, which are those of uPlot 1.6.31; its Python is never imported. index.html
# names their sums, so that a browser takes no others.
_CHART_PACKAGE = "youplot"
_CHARTS = {"uplot.js": "vendor/uplot.iife.min.js", "uplot.css": "vendor/uplot.min.css"}


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


@cache
def known_files() -> dict[str, Path]:
    """Every file that a browser may have, by its name; without uPlot's when its wheel is not installed."""
    files = {path.name: path for path in _OURS.iterdir() if path.suffix in MEDIA_TYPES}
    found = find_spec(_CHART_PACKAGE)
    for folder in (found.submodule_search_locations or []) if found else []:
        files |= {name: Path(folder, *inside.split("/")) for name, inside in _CHARTS.items()}
    return files


@cache
def content(name: str) -> bytes:
    """Raises KeyError for a name that is none of ours."""
    return known_files()[name].read_bytes()
