"""Every query of dashboards and rules, run by a Prometheus that scrapes a worker and an API, and by PostgreSQL."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from consumers.db.engine import get_db
from consumers.operations import get_performance, get_portfolio_history
from consumers.web.api import create_app
from producers.events import ARCHIVE_TYPE
from producers.history_producer import HistoryProducer
from producers.redis_keys import quarantine_key
from tests.documents import ROOT, block
from tests.factories import a_snapshot, an_archive
from tests.grafana import dashboard, promql, queries, sql
from tests.page_app import serving
from tests.prometheus import Prometheus, prometheus, promtool
from tests.rq_programs import until
from tests.scrapes import scraped_worker

_RULES = ROOT / "consumers" / "deploy" / "alerts.yaml"
_SELECTOR = re.compile(r"\b((?:trading_history|process)_\w+|up)\b(\{[^}]*\})?")
_EMPTY_WITHOUT_FAULTS = {"Alerts that fire"}


def _configuration(folder: Path, worker: str, api: str) -> dict[str, Any]:
    """Return the document's configuration with the addresses, files and token of a test."""
    configuration: dict[str, Any] = yaml.safe_load(block("consumers/deploy/MONITORING.md", "prometheus.yml"))
    workers, apis = configuration["scrape_configs"]
    workers["static_configs"][0]["targets"] = [worker]
    apis["static_configs"][0]["targets"] = [api]
    token = folder / "token"
    token.write_text("right", "utf-8")
    apis["authorization"]["credentials_file"] = str(token)
    assert [Path(file).name for file in configuration["rule_files"]] == [_RULES.name]
    return configuration | {"rule_files": [str(_RULES)]}


def test_prometheus_accepts_the_configurations_of_the_document(tmp_path: Path) -> None:
    """The labels and ports are those of kubernetes.yaml, and the name and port those of docker-compose.yml."""
    configuration = _configuration(tmp_path, "worker-host:9464", "api-host:8000")
    discovery = yaml.safe_load(block("consumers/deploy/MONITORING.md", "discovery"))
    (kubernetes,) = discovery["kubernetes"].pop("kubernetes_sd_configs")  # Debian's Prometheus is built without it
    assert kubernetes == {"role": "pod"}
    configuration["scrape_configs"] += [{"job_name": name, **found} for name, found in discovery.items()]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration), "utf-8")
    checked = promtool("check", "config", "prometheus.yml", folder=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (app, port) = discovery["kubernetes"]["relabel_configs"][0]["regex"].split(";")
    manifests = yaml.safe_load_all((_RULES.parent / "kubernetes.yaml").read_text("utf-8"))
    pods = [one["spec"]["template"] for one in manifests if one["kind"] == "Deployment"]
    assert (app, port) in {
        (pod["metadata"]["labels"]["app"], one["name"]) for pod in pods for one in pod["spec"]["containers"][0]["ports"]
    }
    (asked,) = discovery["compose"]["dns_sd_configs"]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    assert services[asked["names"][0]]["environment"]["HISTORY_METRICS_PORT"] == str(asked["port"])


@pytest.fixture
def server(redis: Redis, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prometheus]:
    """Prometheus that scrapes a worker and an API, while events are recorded, one of which is rejected."""
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "outbox.db"))
    monkeypatch.setenv("HISTORY_API_TOKEN", "right")
    with (
        scraped_worker(tmp_path / "log") as (_, url),
        serving(create_app()) as api,
        HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer,
    ):
        producer.record(a_snapshot(timestamp=datetime.now(UTC)))
        until(lambda: len(get_portfolio_history()) == 1)
        configuration = _configuration(tmp_path, urlsplit(url).netloc, urlsplit(api.url).netloc)
        with prometheus(configuration, tmp_path / "prometheus") as server:
            until(lambda: len(server.query("trading_history_database_up == 1")) == 2)
            for number in range(3):
                producer.record(
                    a_snapshot(timestamp=datetime.now(UTC) - timedelta(seconds=number), portfolio_id=number)
                )
            at = datetime.now(UTC)
            for balance in (1, 2):  # the second is a conflict
                producer.record(a_snapshot(timestamp=at, portfolio_id=9, balance=balance))
            producer.record(an_archive(archived_at=at))
            redis.rpush(quarantine_key("history"), "no job id")
            yield server


def test_every_promql_query_has_data_for_a_live_pipeline(server: Prometheus) -> None:
    """Those of the dashboard as Grafana sends them. Each rule is evaluated, and each metric that it uses exists."""
    known = {sample["metric"]["outcome"] for sample in server.query("trading_history_events_total")}
    stored = f'trading_history_events_total{{type="{ARCHIVE_TYPE}", outcome="stored"}}'
    until(lambda: [one["value"][1] for one in server.query(f"increase({stored}[1m]) > bool 0")] == ["1"])
    until(lambda: server.query('ALERTS{alertstate="firing"}') != [])
    empty = [(title, query) for title, _, query in queries("pipeline") if not _finite(server, promql(query))]
    assert empty == []
    (variable,) = (one for one in dashboard("pipeline")["templating"]["list"] if one["type"] == "query")
    ((metric, label),) = re.findall(r"^label_values\((\w+), (\w+)\)$", variable["definition"])
    assert {one["metric"][label] for one in server.query(metric)} == {"trading-history", "trading-history-api"}
    for _, _, query in queries("pipeline"):
        for outcomes in re.findall(r'outcome=~"([\w|]+)"', query):
            assert set(outcomes.split("|")) == known - {"stored", "duplicate", "discarded"}

    (group,) = server.get("rules")["groups"]
    assert [(rule["name"], rule["health"], rule.get("lastError")) for rule in group["rules"]] == [
        (rule["name"], "ok", None) for rule in group["rules"]
    ]
    for rule in group["rules"]:
        for metric, matchers in _SELECTOR.findall(rule["query"]):
            assert server.query(metric + matchers), (rule["name"], metric)
    states = {one["labels"]["alertname"]: one["state"] for one in server.get("alerts")["alerts"]}
    assert states == {"HistoryHasQuarantinedEntries": "firing", "HistoryHasFailedJobs": "pending"}


def _finite(server: Prometheus, query: str) -> bool:
    """Return whether a query has a sample, and no sample is NaN."""
    samples = server.query(query)
    return bool(samples) and all(isfinite(float(sample["value"][1])) for sample in samples)


def test_outbox_that_nobody_scrapes_reaches_prometheus_as_a_text_file(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the script of the document, with the metrics that the rules use, also if the outbox is damaged."""
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "outbox.db"))
    (tmp_path / "trading-history").write_text(f'#!/bin/sh\nexec {sys.executable} -m consumers.cli "$@"\n', "utf-8")
    (tmp_path / "trading-history").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = block("consumers/deploy/MONITORING.md", "textfile")
    file = tmp_path / Path(script.partition("\n")[0].partition("=")[2]).name
    script = f"file={file}\n{script.partition(chr(10))[2]}"
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        producer.record(a_snapshot())
        producer.flush(10)
        assert _samples(script, file) == {
            "trading_history_outbox_up": 1.0,
            "trading_history_outbox_oldest_age_seconds": 0.0,
            "trading_history_outbox_damaged_files": 0.0,
        }
        for number in range(30):
            (tmp_path / f"outbox.db.salvaged-{number}").touch()
        assert _samples(script, file)["trading_history_outbox_damaged_files"] == 1.0
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "damaged.db"))
    before = set(threading.enumerate())
    with HistoryProducer(Redis(port=1), outbox=tmp_path / "damaged.db") as producer:
        for portfolio_id in range(100):
            producer.record(a_snapshot(portfolio_id=portfolio_id))
        producer.close(timeout=0)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # a relay that still runs would move the damaged file away
    with (tmp_path / "damaged.db").open("r+b") as damaged:
        damaged.seek(damaged.seek(0, os.SEEK_END) // 2 // 4096 * 4096)
        damaged.write(random.Random(1).randbytes(4096))
    assert json.loads(_printed("outbox", "status", "--json"))["check"] != "sound"
    assert _samples(script, file) == {"trading_history_outbox_up": 0.0}
    (tmp_path / "damaged.db").write_bytes(b"no database at all" * 1000)
    assert _samples(script, file) == {"trading_history_outbox_up": 0.0}


def _printed(*command: str) -> str:
    return subprocess.run(["trading-history", *command], check=False, capture_output=True, text=True, timeout=30).stdout


def _samples(script: str, file: Path) -> dict[str, float]:
    subprocess.run(["sh", "-c", script], check=True, timeout=30, stderr=subprocess.DEVNULL)
    families = text_string_to_metric_families(file.read_text("utf-8"))
    found = {sample.name: sample.value for family in families for sample in family.samples}
    return {name: value if name.endswith("up") else value // 30 for name, value in found.items()}


_SINCE, _UNTIL = datetime(2026, 6, 1, tzinfo=UTC), datetime(2026, 6, 30, 23, 59, tzinfo=UTC)


@pytest.fixture
def reader(database_url: str) -> Iterator[Connection]:
    """Connection as the login of the document, with the rows that the test has committed."""
    with get_db() as db:
        for statement in block("consumers/deploy/MONITORING.md", "login").split(";"):
            if statement.strip():
                db.execute(text(statement))
    store = create_engine(make_url(database_url).set(username="grafana", drivername="postgresql+psycopg2"))
    with store.connect() as db:
        yield db
        db.rollback()
    store.dispose()
    with get_db() as db:
        db.execute(text("DROP OWNED BY grafana"))
        db.execute(text("DROP ROLE grafana"))


_INSERT = text("""
    INSERT INTO portfolio_history (event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance,
        total_invested, total_profit_loss, total_value, open_positions, trade_count)
    VALUES (gen_random_uuid(), 'test/1', 1, :portfolio, :day, :at, :balance, :invested, :profit, :value, 2, :trades)
""")


def _row(portfolio: int | None, day: int, amounts: str, *, hour: int = 20) -> dict[str, Any]:
    """Return a snapshot of a day from _SINCE on. Amounts: balance, total_invested, total_profit_loss, total_value."""
    at = _SINCE + timedelta(days=day, hours=hour)
    numbers = dict(zip(("balance", "invested", "profit", "value"), map(Decimal, amounts.split()), strict=True))
    return {"portfolio": portfolio, "day": at.date(), "at": at, "trades": 10 * day, **numbers}


def _store(*rows: dict[str, Any]) -> None:
    with get_db() as db:
        db.execute(_INSERT, list(rows))


def _found(db: Connection, title: str, **variables: Any) -> list[dict[str, Any]]:
    """Return the rows of a panel of the portfolios, without those that Grafana does not draw."""
    ((_, _, query),) = (one for one in queries("portfolios") if one[0] == title)
    given = {"portfolios": ("1", "2", "3", "none"), **variables}
    rows = db.execute(text(sql(query, _SINCE, _UNTIL, **given).replace(":", "\\:"))).mappings()
    return [dict(row) for row in rows]


def test_every_sql_query_runs_as_the_reader_and_has_rows(reader: Connection) -> None:
    """Time series have a time, the portfolio and one value. Statements that write are refused."""
    _store(*(_row(portfolio, day, f"1000 0 {day} {1000 + day}") for portfolio in (1, None) for day in range(3)))
    with get_db() as db:
        db.execute(
            text("""
            INSERT INTO signal_archives
                (event_id, source, sequence, archived_at, archive_month, signals_count, signals_data)
            SELECT gen_random_uuid(), 'test/1', 1, CAST(month || '-15T12:00Z' AS timestamptz), month, 2, '[{}, {}]'
            FROM unnest(ARRAY['2026-05', '2026-06', '2026-06', '2026-07']) AS month
        """)
        )
    for title, form, _ in queries("portfolios"):
        for measure in ("auto", "equity", "value"):
            rows = _found(reader, title, measure=measure)
            assert rows, title
            columns = list(rows[0])
            assert form == "table" or (columns[:2] == ["time", "portfolio"] and len(columns) == 3), title
            assert form == "table" or len({row["portfolio"] for row in rows}) == 2, title
    assert _found(reader, "Archived signals per month") == [{"month": "2026-06", "signals": 4, "archives": 2}]
    variables = [one for one in dashboard("portfolios")["templating"]["list"] if one["type"] == "query"]
    for variable in variables:
        assert reader.execute(text(variable["query"])).scalars().all() == ["1", "none"]
    assert reader.execute(text("SHOW statement_timeout")).scalar_one() == "15s"
    for statement in ("DELETE FROM portfolio_history", "CREATE TABLE t (a integer)"):
        reader.rollback()
        with pytest.raises(DBAPIError):
            reader.execute(text(statement))
    reader.rollback()


def test_panels_answer_their_questions(reader: Connection) -> None:
    """The last snapshot of a date or interval counts; changes are since the date before; portfolios can be chosen."""
    _store(
        _row(1, 0, "1000 0 0 1000"),
        _row(1, 1, "1000 0 -50 950", hour=8),
        _row(1, 1, "1010 0 -20 990"),
        _row(2, 1, "5 0 0 5"),
        _row(1, 4, "1000 0 10 1010"),
        _row(1, 4, "1000 0 90 1090", hour=8),  # stored later
        _row(None, 4, "7 0 0 7"),
        _row(None, 4, "9 0 0 9", hour=8),
    )  # fmt: skip

    def points(title: str, **variables: Any) -> list[tuple[Any, ...]]:
        return [tuple(row.values())[2:] for row in _found(reader, title, portfolios=("1",), **variables)]

    assert points("Daily change of profit and loss") == [(None,), (-20.0,), (30.0,)]
    assert points("Trades per day") == [(None,), (10,), (30,)]
    assert points("Snapshots per day") == [(1,), (2,), (2,)]
    assert points("Open positions", interval="12h") == [(2,)] * 5
    assert points("Profit and loss so far", interval="1d") == [(0.0,), (-20.0,), (10.0,)]
    assert [row["time"].isoformat() for row in _found(reader, "Snapshots per day", portfolios=("1",))] == [
        f"2026-06-0{day}T00:00:00+00:00" for day in (1, 2, 5)
    ]
    worth = [(row["time"], row["worth"]) for row in _found(reader, "Worth", portfolios=("1",), interval="1d")]
    assert worth == [(_SINCE.timestamp() + 86400 * day, value) for day, value in ((0, 1000), (1, 990), (4, 1010))]
    (latest,) = _found(reader, "Latest snapshots", portfolios=("1",))
    assert (latest["profit_loss"], latest["trades"], latest["snapshot"].day) == (10.0, 40, 5)
    assert [row["worth"] for row in _found(reader, "Latest snapshots", portfolios=("none",))] == [7.0]


def test_fully_invested_portfolio_is_not_shown_as_worthless(reader: Connection) -> None:
    """Its total_value leaves out the invested money. A deposit is neither profit nor drawdown."""
    _store(
        _row(1, 0, "10000 0 0 10000"),
        _row(1, 1, "0 10000 0.35 0.35"),
        _row(2, 0, "500 500 10 1010"),  # its total_value has everything
        _row(2, 1, "1500 500 5 2005"),  # a deposit of 1000, and a loss of 5
        _row(2, 2, "1500 500 5 2005"),
        _row(2, 3, "1500 500 20 2020"),
        _row(2, 4, "1500 500 30 2030"),
    )  # fmt: skip

    def worth(title: str, measure: str, portfolio: str) -> list[float]:
        return [row["worth"] for row in _found(reader, title, measure=measure, portfolios=(portfolio,), interval="1d")]

    assert worth("Worth", "auto", "1") == worth("Worth", "equity", "1") == [10000.0, 10000.35]
    assert worth("Worth", "value", "1") == [10000.0, 0.35]
    assert worth("Worth", "auto", "2") == worth("Worth", "value", "2") == [1010.0, 2005.0, 2005.0, 2020.0, 2030.0]
    for portfolio, measure, expected in (("1", "auto", 10000.35), ("1", "equity", 10000.35), ("1", "value", 0.35),
                                         ("2", "auto", 2030.0), ("2", "value", 2030.0)):  # fmt: skip
        assert worth("Latest snapshots", measure, portfolio) == [expected]
    assert [row["drawdown"] for row in _found(reader, "Drawdown", portfolios=("1",))] == [0.0]
    assert _found(reader, "Drawdown", portfolios=("1",), measure="value") == []  # no figures
    lost = [row["drawdown"] for row in _found(reader, "Drawdown", portfolios=("2",))]
    assert lost == pytest.approx([-5 / 1010, -5 / 1010, 0, 0])


@pytest.mark.parametrize("measure", ["auto", "equity", "value"])
def test_drawdown_is_that_of_the_performance_or_missing_where_it_has_no_figures(
    reader: Connection, measure: str
) -> None:
    """For portfolios of few, often extreme, closes."""
    chance = random.Random(20)
    rows = []
    for portfolio in range(1, 121):
        kind, paid_in, gained = chance.choice(["old", "all", "value"]), chance.choice([0, 100, 1000]), 0
        for day in range(chance.randint(1, 6)):
            invested = chance.choice([0, 0, 50])
            paid_in += chance.choice([0, 0, 0, 0, 0, 0, 0, 70])
            gained += chance.choice([0, 10, 10, -10, -10, -100, -gained])
            value = {"old": paid_in - invested + gained, "all": paid_in + gained, "value": paid_in}[kind]
            rows.append(_row(portfolio, day, f"{paid_in - invested} {invested} {gained} {value}"))
            rows.append(_row(portfolio, day, "1 1 1 1", hour=8))  # not the last one of the date
    _store(*rows)
    found: dict[str, float] = {}
    for row in _found(reader, "Drawdown", measure=measure, portfolios=[str(number) for number in range(1, 121)]):
        found[row["portfolio"]] = min(found.get(row["portfolio"], 0.0), row["drawdown"])
    expected = {
        str(one["portfolio_id"]): (one["figures"]["deepest_drawdown"] or {"share": 0.0})["share"]
        for one in get_performance(measure=None if measure == "auto" else measure)  # type: ignore[arg-type]
        if one["figures"] is not None
    }
    assert len(expected) > 10
    assert found == pytest.approx(expected)
