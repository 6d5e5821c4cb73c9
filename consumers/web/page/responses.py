"""Answers of the page's routes: files and compact JSON, with gzip and with 304 for unchanged content.

The files are those in `static` and uPlot's two files, which are read from the package youplot.
"""

from __future__ import annotations

import gzip
import json
from datetime import date
from decimal import Decimal
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import Request, Response

# Nothing is loaded from other sites, nothing is inline, and no text is parsed as markup.
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
# Only these two files of youplot are used: they are uPlot 1.6.31. Its Python code is never imported. index.html has
# their hashes (Subresource Integrity), so a browser accepts no other files.
_CHART_PACKAGE = "youplot"
_CHARTS = {"uplot.js": "vendor/uplot.iife.min.js", "uplot.css": "vendor/uplot.min.css"}


def answer(request: Request, body: bytes, media_type: str) -> Response:
    """Return `body`, or 304 if the browser has it already."""
    tag = f'W/"{sha256(body).hexdigest()[:32]}"'
    headers = SECURITY_HEADERS | {"Cache-Control": "private, no-cache", "ETag": tag, "Vary": "Accept-Encoding"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if len(body) > _WORTH_COMPRESSING_BYTES and "gzip" in request.headers.get("accept-encoding", ""):
        body = gzip.compress(body, compresslevel=6, mtime=0)
        headers["Content-Encoding"] = "gzip"
    return Response(body, media_type=media_type, headers=headers)


def json_answer(request: Request, facts: Any) -> Response:
    """Return values as JSON: amounts as exact text, times in UTC as ISO 8601 with offset."""
    body = json.dumps(facts, default=_plain, ensure_ascii=False, separators=(",", ":"))
    return answer(request, body.encode(), "application/json")


def _plain(value: Decimal | date) -> str:
    return f"{value:f}" if isinstance(value, Decimal) else value.isoformat()


@cache
def known_files() -> dict[str, Path]:
    """Return the path of every file that may be served, by name. Without youplot, uPlot's files are missing."""
    files = {path.name: path for path in _OURS.iterdir() if path.suffix in MEDIA_TYPES}
    found = find_spec(_CHART_PACKAGE)
    for folder in (found.submodule_search_locations or []) if found else []:
        files |= {name: Path(folder, *inside.split("/")) for name, inside in _CHARTS.items()}
    return files


@cache
def content(name: str) -> bytes:
    """Return the content of a file.

    Raises:
        KeyError: No file of this name may be served.
    """
    return known_files()[name].read_bytes()
