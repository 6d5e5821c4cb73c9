"""The alert rules of consumers/deploy: each fires within its promise, and is quiet just below its limit."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from consumers.cli import app
from consumers.ops.outbox_health import OUTBOX_LATE_SECONDS, OutboxHealth
from consumers.ops.queue_health import QUEUE_LATE_SECONDS
from producers.outbox import MAX_BYTES
from tests.documents import ROOT, block, table
from tests.prometheus import promtool

_DEPLOY = ROOT / "consumers" / "deploy"
_RULES = yaml.safe_load((_DEPLOY / "alerts.yaml").read_text("utf-8"))
_ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in _RULES["groups"][0]["rules"]}
_TESTS = yaml.safe_load((_DEPLOY / "alerts_test.yaml").read_text("utf-8"))["tests"]
_ALL = 'ALERTS{alertstate="firing"}'


def _labels(sample: dict[str, Any]) -> dict[str, str]:
    return dict(re.findall(r'(\w+)="([^"]*)"', sample["labels"]))


def _minutes(duration: str) -> int:
    """Return the minutes of a duration such as `26 hours and 3 minutes` or `9m`."""
    hours, minutes = re.search(r"(\d+) hours", duration), re.search(r"(\d+) ?m", duration)
    return 60 * int(hours[1] if hours else 0) + int(minutes[1] if minutes else 0)


def _first_firing(alert: str) -> list[int]:
    """Return, for each test that expects the alert, the minutes from the fault until it does first."""
    return [
        min(minutes)
        + (60 * int(before[1]) if (before := re.search(r"(\d+) hours before minute 0", test["name"])) else 0)
        for test in _TESTS
        if (
            minutes := [
                _minutes(check["eval_time"])
                for check in test["promql_expr_test"]
                if alert in {_labels(sample)["alertname"] for sample in check.get("exp_samples", [])}
            ]
        )
    ]


def _run(rules: str, folder: Path, tests: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the tests of the rules, or `tests`, on this text of alerts.yaml."""
    folder.mkdir(exist_ok=True)
    (folder / "alerts.yaml").write_text(rules, "utf-8")
    (folder / "alerts_test.yaml").write_text(tests or (_DEPLOY / "alerts_test.yaml").read_text("utf-8"), "utf-8")
    return promtool("test", "rules", "alerts_test.yaml", folder=folder)


def test_promtool_accepts_the_rules_and_their_tests(tmp_path: Path) -> None:
    """By the commands of the document."""
    for name in ("alerts.yaml", "alerts_test.yaml"):
        shutil.copy(_DEPLOY / name, tmp_path)
    for line in block("consumers/deploy/MONITORING.md", "promtool").splitlines():
        _, *arguments = line.split()
        ended = promtool(*arguments, folder=tmp_path)
        assert (ended.returncode, "SUCCESS" in ended.stdout) == (0, True), ended.stdout + ended.stderr


@pytest.mark.parametrize("alert", _ALERTS)
def test_each_alert_is_tested_one_minute_before_the_end_of_its_promise(alert: str) -> None:
    """One minute may pass between a scrape and the evaluation. Another test expects that the alert is quiet."""
    found = re.fullmatch(
        r"Fires within ((?:\d+ hours and )?\d+ minutes) of .+\.", _ALERTS[alert]["annotations"]["promise"]
    )
    assert found
    assert max(_first_firing(alert)) <= _minutes(found[1]) - 1
    assert _minutes(found[1]) - 1 in _first_firing(alert)
    assert any(alert in test["name"] and " quiet " in test["name"] for test in _TESTS)
    assert _minutes(_ALERTS[alert].get("for", "0m")) < _minutes(found[1])


def test_each_test_lists_all_alerts_that_fire() -> None:
    """Also those that it is not about."""
    assert {check["expr"] for test in _TESTS for check in test["promql_expr_test"]} == {_ALL}


_SPARE_MINUTES = {
    "HistoryWorkerWaits": 1,
    "HistoryEventsAreLate": 3,
}  # of the promise; a frozen server is noticed after 25 s
_CHANGES = [  # of a rule: its tests must notice each
    *((alert, f"for: {rule['for']}", f"for: {_minutes(rule['for']) + 1 + _SPARE_MINUTES.get(alert, 0)}m")
        for alert, rule in _ALERTS.items() if "for" in rule),
    *((alert, f"for: {rule['for']}", "for: 0m") for alert, rule in _ALERTS.items() if "for" in rule),
    ("HistoryIsNotScraped", "absent(trading_history_database_up)", "absent(trading_history_redis_up)"),
    ("HistoryTargetIsDown", 'up{job=~".*trading-history.*"}', "up"),
    ("HistoryTargetIsDown", ".*trading-history.*", "trading-history-api"),
    ("HistoryHasNoWorker", "last_over_time(trading_history_workers[3m])", "trading_history_workers"),
    ("HistoryHasNoWorker", "[3m]", "[5m]"),
    ("HistoryHasNoWorker", "min(", "max("),
    ("HistoryHasNoWorker", "== 0", "== 0 or absent(trading_history_workers)"),
    ("HistoryWorkerWaits", "[3m]", "[6m]"),
    ("HistoryDatabaseIsAway", "max_over_time", "min_over_time"),
    ("HistoryRedisIsAway", "[3m]", "[5m]"),
    ("HistoryQueueIsLate", "max(last_over_time", "(last_over_time"),
    ("HistoryQueueIsLate", "last_over_time", "max_over_time"),
    ("HistoryQueueIsLate", "> 300", ">= 300"),
    ("HistoryQueueIsLate", "> 300", "> 360"),
    ("HistoryOutboxIsLate", "> 600", ">= 600"),
    ("HistoryOutboxIsLate", "> 600", "> 660"),
    ("HistoryOutboxIsLate", "last_over_time(trading_history_outbox_oldest_age_seconds[3m])",
        "max(trading_history_outbox_oldest_age_seconds)"),
    ("HistoryOutboxIsNearlyFull", "> 0.9", "> 0.899999999"),
    ("HistoryOutboxIsNearlyFull", "> 0.9", "> 0.900000001"),
    ("HistoryOutboxCannotBeRead", "[3m]", "[5m]"),
    ("HistoryOutboxIsDamaged", "> 0", "> 1"),
    ("HistoryOutboxIsDamaged", "[3m]", "[1m]"),
    ("HistoryHasFailedJobs", "max(", "("),
    ("HistoryHasFailedJobs", "> 0", "> 1"),
    ("HistoryHasQuarantinedEntries", "> 0", ">= 0"),
    ("HistoryHasQuarantinedEntries", "last_over_time", "max_over_time"),
    ("HistoryWorkerCrashed", "recovered_jobs_total > 0", "recovered_jobs_total > 5"),
    ("HistoryWorkerCrashed", "and on (job, instance) process_start_time_seconds > time() - 3600", ""),
    ("HistoryWorkerCrashed", "increase(trading_history_recovered_jobs_total[1h]) > 0 or ", ""),
    ("HistoryEventsAreLate", "[5m]", "[15m]"),
    ("HistoryEventsAreLate", "> 60", ">= 60"),
    ("HistoryEventsAreLate", "0.99", "0.9"),
    ("PortfolioHasNoNewSnapshot", "> 93600", ">= 93600"),
    ("PortfolioHasNoNewSnapshot", "> 93600", "> 93720"),
    ("PortfolioHasNoNewSnapshot", "< 1209600", "<= 1209600"),
    ("PortfolioHasNoNewSnapshot", " < 1209600", ""),
    ("PortfolioHasNoNewSnapshot", "min by (portfolio_id) ", ""),
]  # fmt: skip


def test_the_tests_of_the_rules_notice_each_changed_rule(tmp_path: Path) -> None:
    """A limit, a time or an aggregation that is changed in one rule fails at least one of them."""
    changed = {f"{alert}_{number}": (alert, *change) for number, (alert, *change) in enumerate(_CHANGES)}
    assert {alert for alert, *_ in _CHANGES} == set(_ALERTS)
    rules = []
    for name, (alert, before, after) in changed.items():
        text = yaml.safe_dump({"expr": _ALERTS[alert]["expr"]} | _only(_ALERTS[alert], "for"), width=1000)
        assert before in text, name
        rules.append(
            {"alert": name, "labels": _ALERTS[alert]["labels"]} | yaml.safe_load(text.replace(before, after, 1))
        )
    tests = []
    for test in _TESTS:
        checks = [
            {
                "eval_time": check["eval_time"],
                "expr": f'ALERTS{{alertname="{name}", alertstate="firing"}}',
                "exp_samples": [
                    {**sample, "labels": sample["labels"].replace(alert, name)}
                    for sample in check.get("exp_samples", [])
                    if _labels(sample)["alertname"] == alert
                ],
            }
            for check in test["promql_expr_test"]
            for name, (alert, *_) in changed.items()
            if alert in test["name"]
        ]
        tests.append({**test, "promql_expr_test": checks})
    file = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": tests}
    ended = _run(yaml.safe_dump({"groups": [{"name": "changed", "rules": rules}]}), tmp_path, yaml.safe_dump(file))
    assert [changed[name] for name in changed if f'\\"{name}\\"' not in ended.stdout + ended.stderr] == [], ended.stdout


def _only(rule: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: rule[name] for name in names if name in rule}


_SUMMARIES = {
    "HistoryIsNotScraped": "No worker and no API is scraped.",
    "HistoryTargetIsDown": "trading-history at a is not scraped.",
    "HistoryHasNoWorker": "No worker is registered in Redis.",
    "HistoryWorkerWaits": "The worker at a waits for the database.",
    "HistoryDatabaseIsAway": "trading-history at a cannot read the database.",
    "HistoryRedisIsAway": "trading-history at a cannot read Redis.",
    "HistoryWorkersAreSuspended": "RQ's workers are suspended.",
    "HistoryQueueIsLate": "The job at the front of the queue has waited for 9m 0s.",
    "HistoryOutboxIsLate": "The oldest event in the outbox at controller that no worker has acknowledged is"
    " 14m 0s old.",
    "HistoryOutboxIsNearlyFull": "The outbox at a has reached 90% of its limit.",
    "HistoryOutboxCannotBeRead": "The outbox at a cannot be read.",
    "HistoryOutboxIsDamaged": "The outbox at a was damaged; quarantined files: 1.",
    "HistoryHasFailedJobs": "Rejected events in RQ's failed registry: 1.",
    "HistoryHasQuarantinedEntries": "Unusable entries of the queue in quarantine: 1.",
    "HistoryWorkerCrashed": "About 5 jobs were requeued in the last hour because their worker had crashed.",
    "HistoryEventsAreLate": "1 % of the events are stored more than 3m 40s after their own time.",
    "PortfolioHasNoNewSnapshot": "The newest snapshot of portfolio 1 is 1d 2h 2m 0s old.",
}


def test_summaries_name_host_portfolio_and_value(tmp_path: Path) -> None:
    """Descriptions and promises are the same for each alert of a rule."""
    tests = []
    for test in _TESTS:
        checks = [
            {"eval_time": check["eval_time"], "alertname": labels["alertname"], "labels": labels}
            for check in test.pop("promql_expr_test")[:1]
            for labels in map(_labels, check.get("exp_samples", []))
        ]
        for check in checks:
            labels, alert = check.pop("labels"), check["alertname"]
            if alert == "HistoryWorkerCrashed" and "another worker" in test["name"]:
                continue  # Prometheus extrapolates an increase
            annotations = _ALERTS[alert]["annotations"] | {"summary": _SUMMARIES[alert]}
            assert "{{" not in annotations["description"] + annotations["promise"]
            given = {name: value for name, value in labels.items() if name not in {"alertname", "alertstate"}}
            check["exp_alerts"] = [{"exp_labels": given, "exp_annotations": annotations}]
            tests.append({**test, "alert_rule_test": [check]})
    assert {test["alert_rule_test"][0]["alertname"] for test in tests} == set(_ALERTS)
    file = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": tests}
    ended = _run((_DEPLOY / "alerts.yaml").read_text("utf-8"), tmp_path, yaml.safe_dump(file))
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_each_rule_has_a_severity_and_names_an_existing_command() -> None:
    names = {path.stem for path in (_DEPLOY / "systemd").iterdir()}
    for alert, rule in _ALERTS.items():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"critical", "warning"}, alert
        assert set(rule["annotations"]) == {"summary", "description", "promise"}
        commands = re.findall(r"`([^`]+)`", rule["annotations"]["description"])
        assert commands, alert
        for command in commands:
            program, *words = command.split()
            if program == "systemctl":
                assert words[1] in names
            elif program == "trading-history":
                _parse(words)
            else:
                assert command in {"docker compose ps", "rq suspend", "rq resume"}


def _parse(words: list[str]) -> None:
    """Raise if `trading-history` does not accept these words."""
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    command.make_context("trading-history", list(words))


def test_the_table_of_alerts_agrees_with_the_rules() -> None:
    listed = {cells[0].strip("`"): (cells[1], cells[2]) for cells in table("consumers/deploy/MONITORING.md", "alerts")}
    assert listed == {
        alert: (
            rule["labels"]["severity"],
            rule["annotations"]["promise"].removeprefix("Fires within ").removesuffix("."),
        )
        for alert, rule in _ALERTS.items()
    }
    muted = yaml.safe_load(block("consumers/deploy/MONITORING.md", "alertmanager.yml"))["inhibit_rules"]
    matchers = [matcher for rule in muted for side in rule.values() for matcher in side]
    assert set(re.findall(r"History\w+", " ".join(matchers))) <= set(_ALERTS)


def _limit(alert: str) -> float:
    return float(re.findall(r"> ([\d.]+)", _ALERTS[alert]["expr"])[0])


def test_the_limits_are_those_of_doctor() -> None:
    assert _limit("HistoryQueueIsLate") == QUEUE_LATE_SECONDS
    assert _limit("HistoryOutboxIsLate") == OUTBOX_LATE_SECONDS
    states = []
    for used in (
        int(_limit("HistoryOutboxIsNearlyFull") * MAX_BYTES),
        int(_limit("HistoryOutboxIsNearlyFull") * MAX_BYTES) + 1,
    ):
        (check,) = (one for one in OutboxHealth(0, 0, 0, None, used).checks() if one.name == "outbox size")
        states.append(check.state)
    assert states == ["warn", "fail"]
