"""The page's files: our own beside this module, and uPlot's out of the wheel that carries them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

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
