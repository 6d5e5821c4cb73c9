"""The Grafana dashboards of consumers/deploy, and their queries as Grafana sends them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tests.documents import ROOT

FOLDER = ROOT / "consumers" / "deploy" / "grafana"
NAMES = ("pipeline", "portfolios")
_MACRO = re.compile(r"\$([_a-zA-Z0-9]+)\(([^)]*)\)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def dashboard(name: str) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return board


def panels(name: str) -> list[dict[str, Any]]:
    """Return the panels with data; rows are only headings."""
    return [panel for panel in dashboard(name)["panels"] if panel["type"] != "row"]


def queries(name: str) -> Iterator[tuple[str, str, str]]:
    """Yield the title of the panel, its format and the text of each query."""
    for panel in panels(name):
        for target in panel["targets"]:
            yield panel["title"], target["format"], target.get("expr") or target["rawSql"]


def promql(text: str) -> str:
    """Return a query of all jobs as Prometheus gets it."""
    return text.replace("$__rate_interval", "15s").replace("$job", ".*")


def sql(
    text: str,
    since: datetime,
    until: datetime,
    *,
    interval: str = "1h",
    measure: str = "auto",
    portfolios: Sequence[str] = (),
) -> str:
    """Return a query as PostgreSQL gets it: Grafana's page fills in the variables, then its server the macros."""
    values = {
        "$measure": measure,
        "$__interval": interval,
        "${portfolio:sqlstring}": ",".join(f"'{one}'" for one in portfolios),
    }
    for name, value in values.items():
        text = text.replace(name, value)
    return _MACRO.sub(lambda found: _expansion(found, text, since, until), text)


def _expansion(found: re.Match[str], text: str, since: datetime, until: datetime) -> str:
    name, arguments = found[1], [one.strip() for one in found[2].split(",")]
    first, last = (f"'{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}'" for at in (since, until))
    if name == "__timeFrom":
        return first
    if name == "__timeTo":
        return last
    if name == "__timeFilter":
        return f"{arguments[0]} BETWEEN {first} AND {last}"
    if name == "__timeGroup":
        number, unit = re.fullmatch(r"'(\d+)([smhd])'", arguments[1]).groups()  # type: ignore[union-attr]  # else fail
        seconds = int(number) * _SECONDS[unit]
        grouped = f"floor(extract(epoch from {arguments[0]})/{seconds})*{seconds}"
        # Old dashboards relied on this: the column gets its name if a comma follows the first such call.
        after = text[text.index(found[0]) + len(found[0]) :]
        return f'{grouped} AS "time"' if after.startswith(",") else grouped
    raise AssertionError(f"Grafana's macro ${name} is not known here")


def thresholds(panel: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """Return colour and value of each threshold of a panel, or of the column that has its own."""
    found = [panel["fieldConfig"]["defaults"]["thresholds"]]
    for override in panel["fieldConfig"]["overrides"]:
        found += [one["value"] for one in override["properties"] if one["id"] == "thresholds"]
    return [(step["color"], step["value"]) for step in found[-1]["steps"]]
