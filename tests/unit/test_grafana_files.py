"""The Grafana dashboards as files: what Grafana needs to import them, and what an operator needs to read them."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
import yaml

from consumers.db.measures import EXPRESSIONS, FITS, OLD_FORMULA
from tests.documents import ROOT, block, table
from tests.grafana import FOLDER, NAMES, dashboard, panels, queries, thresholds

_ALERTS: dict[str, Any] = {
    rule["alert"]: rule
    for rule in yaml.safe_load((ROOT / "consumers/deploy/alerts.yaml").read_text("utf-8"))["groups"][0]["rules"]
}
_UNITS = {"none", "s", "bytes", "eps", "percentunit"}
_TYPES = {"row", "stat", "timeseries", "state-timeline", "table", "barchart"}
_GRAFANA_10 = 38


@pytest.mark.parametrize("name", NAMES)
def test_dashboard_can_be_imported(name: str) -> None:
    """Grafana 10 knows its schema, and it names no data source of another Grafana: the reader chooses one."""
    board = dashboard(name)
    assert (board["schemaVersion"], board["uid"]) == (_GRAFANA_10, f"trading-history-{name}")
    assert len(board["uid"]) <= 40
    assert not {"id", "gnetId", "__inputs"} & set(board)
    (source,) = (one for one in board["templating"]["list"] if one["type"] == "datasource")
    kind = {"pipeline": "prometheus", "portfolios": "postgres"}[name]
    assert (source["name"], source["query"]) == ("datasource", kind)
    chosen = {"type": kind, "uid": "${datasource}"}
    for panel in panels(name):
        assert panel["datasource"] == chosen
        assert [target["datasource"] for target in panel["targets"]] == [chosen] * len(panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for variable in board["templating"]["list"]:
        assert variable["type"] != "query" or variable["datasource"] == chosen
    assert {path.stem for path in FOLDER.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_unique_ids_and_do_not_overlap(name: str) -> None:
    """They fill each row of the grid, which is 24 wide: Grafana would move them otherwise."""
    board = dashboard(name)["panels"]
    assert len({panel["id"] for panel in board}) == len(board)
    cells = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in (panel["gridPos"] for panel in board)
    ]
    overlapping = [(one, other) for one, other in combinations(range(len(cells)), 2) if cells[one] & cells[other]]
    assert overlapping == []
    used = set().union(*cells)
    assert used == {(x, y) for x in range(24) for y in range(max(y for _, y in used) + 1)}


@pytest.mark.parametrize("name", NAMES)
def test_each_panel_says_what_it_shows(name: str) -> None:
    """Title, description, unit, and a legend for each line."""
    titles = [(panel["type"], panel["title"]) for panel in panels(name)]
    assert len(set(titles)) == len(titles)
    for panel in dashboard(name)["panels"]:
        assert panel["type"] in _TYPES
        if panel["type"] == "row":
            assert (panel["panels"], panel["collapsed"]) == ([], False)
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in _UNITS, panel["title"]
        if panel["type"] in {"timeseries", "state-timeline", "barchart"}:
            assert panel["options"]["legend"]["showLegend"]
        for target in panel["targets"]:
            named = target.get("legendFormat") or panel["fieldConfig"]["defaults"].get("displayName")
            assert named or target["format"] == "table", panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_queries_use_the_variables_of_their_dashboard(name: str) -> None:
    board = dashboard(name)
    known = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval", "__interval"}
    used = set()
    for _, _, text in queries(name):
        used |= set(re.findall(r"\$\{?(\w+)", re.sub(r"\$\w+\(", "", text)))
    assert used <= known
    assert {variable["name"] for variable in board["templating"]["list"]} - {"datasource"} <= used
    # Of several pipelines in one Prometheus, the chosen one. Alerts that are of no single process have no job.
    for title, _, text in queries(name):
        selectors = re.findall(r"((?:trading_history_|process_)\w+)(\{[^}]*\})?(?!\w)", text)
        joined = text.count("and on (job, instance) trading_history_database_up")
        assert name != "pipeline" or sum('job=~"$job"' not in matchers for _, matchers in selectors) == joined, title


def _expected(alert: str) -> list[tuple[str, float | None]]:
    """Return the thresholds that show the limit of an alert."""
    rule = _ALERTS[alert]
    colour = {"critical": "red", "warning": "orange"}[rule["labels"]["severity"]]
    comparison, number = re.findall(r"(==|>) ([\d.]+)", rule["expr"])[0]
    if comparison == "==" and number == "0":
        return [(colour, None), ("green", 1)]
    return [("green", None), (colour, float(number) or 1)]  # counts: Grafana colours from the threshold on


def test_thresholds_are_the_limits_of_the_alerts() -> None:
    """Each alert with a limit is drawn in a panel that names it, in the colour of its severity."""
    drawn = set()
    for panel in [*panels("pipeline"), *panels("portfolios")]:
        named = re.findall(r"\b(?:History|Portfolio)[A-Z]\w+", panel["description"])
        assert set(named) <= set(_ALERTS), panel["title"]
        steps = thresholds(panel)
        if len(steps) > 1:
            assert named, panel["title"]
            assert _expected(named[0]) == steps, panel["title"]
            drawn |= set(named)
    assert set(_ALERTS) == drawn


def test_worth_is_computed_as_in_the_other_programs() -> None:
    """By the measures of consumers/db/measures.py."""
    computed = [" ".join(text.split()) for _, _, text in queries("portfolios") if " worth" in text]
    assert len(computed) == 3
    for text in computed:
        assert text.count(f"THEN {EXPRESSIONS['equity']}") == text.count("total_invested + ") == 2
        assert text.count(FITS[OLD_FORMULA]) == text.count("abs(total_value - ")


def test_the_documents_list_the_dashboards() -> None:
    """With what they show; the provisioning file is YAML that names the types of their data sources."""
    text = (ROOT / "consumers/deploy/MONITORING.md").read_text("utf-8")
    assert set(re.findall(r"\(grafana/(\w+)\.json\)", text)) == set(NAMES)
    sources, provider = yaml.safe_load_all(block("consumers/deploy/MONITORING.md", "provisioning"))
    assert {one["type"] for one in sources["datasources"]} == {"prometheus", "postgres"}
    assert provider["providers"][0]["type"] == "file"
    login = block("consumers/deploy/MONITORING.md", "login")
    (user,) = (one["user"] for one in sources["datasources"] if "user" in one)
    assert f"CREATE ROLE {user} LOGIN" in login
    roles = {cells[0].strip("`") for cells in table("consumers/db/README.md", "roles")}
    assert set(re.findall(r"GRANT (\w+) TO", login)) <= roles
