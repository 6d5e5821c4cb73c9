"""Judgement of a night: each kind of wrong alert is noticed, and so is a rule without a fault."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import yaml

from tests.documents import table
from tests.faults.alert_rules import Rule, rules_of, shortened
from tests.faults.night import RULES
from tests.faults.night_judgement import Expected, Firing, Happened, check_script, judge, promised_seconds
from tests.faults.night_script import SCRIPT, SITES

_RULES = {
    "NoWorker": Rule("NoWorker", "workers == 0", for_seconds=300, limit_seconds=0, window_seconds=0),
    "OutboxIsLate": Rule("OutboxIsLate", "age > 600", for_seconds=0, limit_seconds=600, window_seconds=0),
    "Crashed": Rule("Crashed", "increase(...[1h]) > 0", for_seconds=0, limit_seconds=0, window_seconds=3600),
}
_INTERVAL = 5.0
_STOPPED = Happened("workers stopped", [Expected("NoWorker", {"queue": "q"})], ["OutboxIsLate"], 1000, 1320, 1322)
_CRASH = Happened("crash", [Expected("Crashed", notice_seconds=30)], [], 100, 110, 110)
_IN_TIME = Firing("NoWorker", {"queue": "q", "instance": "a"}, 1310, 1330)


def _problems(*firings: Firing, happened: Sequence[Happened] = (_STOPPED,)) -> list[str]:
    return judge(happened, firings, _RULES, interval=_INTERVAL).problems


def test_an_alert_in_time_that_is_resolved_in_time_is_no_problem() -> None:
    """The promise is `for`, a scrape and an evaluation of 5 s each, and 5 s for both to be done."""
    (row,) = judge([_STOPPED], [_IN_TIME], _RULES, interval=_INTERVAL).rows
    assert (row.promised_after, row.fired_after, row.resolved_after, row.problem) == (315, 310, 8, None)
    assert _problems(_IN_TIME) == []


def test_a_consequence_may_fire_but_need_not() -> None:
    assert _problems(_IN_TIME, Firing("OutboxIsLate", {"instance": "a"}, 1100, 1340)) == []


@pytest.mark.parametrize(
    ("firings", "problem"),
    [
        ([], "workers stopped: NoWorker{queue=q} did not fire"),
        ([Firing("NoWorker", {"queue": "q"}, 1316, 1330)], "NoWorker{queue=q} fired after 316 s instead of 315 s"),
        ([Firing("NoWorker", {"queue": "q"}, 1305, 1316)], "NoWorker{queue=q} ended 4 s before the repair"),
        ([Firing("NoWorker", {"queue": "other"}, 1310, 1330)], "NoWorker{queue=q} did not fire"),
        ([_IN_TIME, Firing("NoWorker", {"queue": "other"}, 1310, 1330)], "false alert: NoWorker{queue=other} fired"),
        ([Firing("NoWorker", {"queue": "q"}, 990, 1330)], "false alert: NoWorker{queue=q} fired for 340 s"),
        ([_IN_TIME, Firing("NoWorker", {"queue": "q"}, 1500, 1510)], "false alert: NoWorker{queue=q} fired for 10 s"),
        ([_IN_TIME, Firing("Crashed", {}, 1100, 1101)], "false alert: Crashed fired for 1 s without a fault"),
        ([Firing("NoWorker", {"queue": "q"}, 1310, 1400)], "NoWorker{queue=q} was resolved 8 s too late"),
        ([_IN_TIME, Firing("OutboxIsLate", {}, 1310, 1400)], "OutboxIsLate was resolved 8 s too late"),
    ],
)
def test_each_kind_of_wrong_alert_is_a_problem(firings: list[Firing], problem: str) -> None:
    assert [one for one in _problems(*firings) if problem in one]


def test_an_alert_of_two_workers_is_one_alert() -> None:
    """The instance that fires first counts, and the one that is resolved last."""
    other = Firing("NoWorker", {"queue": "q", "instance": "b"}, 1305, 1321)
    (row,) = judge([_STOPPED], [_IN_TIME, other], _RULES, interval=_INTERVAL).rows
    assert (row.fired_after, row.resolved_after, row.problem) == (305, 8, None)


def test_an_alert_may_fire_on_while_a_second_fault_allows_it() -> None:
    late = Happened("relay stopped", [Expected("OutboxIsLate")], [], 500, 1400, 1400)
    firing = Firing("OutboxIsLate", {}, 1110, 1430)
    assert _problems(_IN_TIME, firing, happened=[_STOPPED, late]) == []
    assert _problems(_IN_TIME, Firing("OutboxIsLate", {}, 1110, 1480), happened=[_STOPPED, late]) == [
        "OutboxIsLate was resolved 10 s too late after the fault relay stopped"
    ]


def test_a_rule_with_a_range_is_resolved_when_the_range_is_over() -> None:
    assert _problems(Firing("Crashed", {}, 140, 3720, is_predicted=True), happened=[_CRASH]) == []
    assert _problems(Firing("Crashed", {}, 140, 3790, is_predicted=True), happened=[_CRASH]) == [
        "Crashed was resolved 10 s too late after the fault crash"
    ]


def test_the_script_raises_each_alert_of_the_rule_file() -> None:
    rules = rules_of(yaml.safe_load(RULES.read_text("utf-8")))
    alerts = [one.alert for fault in SCRIPT for one in fault.expected]
    check_script(alerts, rules)
    with pytest.raises(ValueError, match=f"no fault of the night raises {alerts[0]}: add one to"):
        check_script([one for one in alerts if one != alerts[0]], rules)
    with pytest.raises(ValueError, match="the night expects NewAlert, which the rule file does not have"):
        check_script([*alerts, "NewAlert"], rules)


def test_the_night_is_at_least_as_strict_as_the_promise_of_each_rule() -> None:
    """The promise in the rule file is for a scrape and an evaluation per minute."""
    document = yaml.safe_load(RULES.read_text("utf-8"))
    rules = rules_of(document)
    stated = {one["alert"]: one["annotations"]["promise"] for group in document["groups"] for one in group["rules"]}
    for fault in SCRIPT:
        for expected in fault.expected:
            found = re.match(r"Fires within (?:(\d+) hours and )?(\d+) minutes", stated[expected.alert])
            assert found is not None
            seconds = 3600 * int(found[1] or 0) + 60 * int(found[2])
            assert promised_seconds(rules[expected.alert], expected, 5.0) <= seconds, expected


def test_the_document_has_each_fault_with_its_alerts() -> None:
    documented = [
        (site, fault, alerts.replace("`", "")) for site, fault, alerts in table("tests/faults/README.md", "night")
    ]
    assert documented == [
        (site, fault.name, " ".join(one.alert for one in fault.expected) or "none")
        for site in ("first", "second")
        for fault in SITES[site]
    ]


_FILE: dict[str, Any] = {
    "groups": [
        {
            "name": "one",
            "rules": [
                {"alert": "A", "expr": "max(x_queue_oldest_age_seconds) > 300  # 5 min", "for": "5m"},
                {"alert": "B", "expr": "histogram_quantile(0.99, sum by (le) (rate(x_lag_seconds_bucket[15m]))) > 60"},
                {"record": "c", "expr": "1"},
            ],
        }
    ]
}


def test_limits_and_times_are_read_from_a_rule() -> None:
    """A limit of a lag is no time to wait for."""
    rules = rules_of(_FILE)
    assert [(one.for_seconds, one.limit_seconds, one.window_seconds) for one in rules.values()] == [
        (300, 300, 0),
        (0, 0, 900),
    ]


def test_shortened_rules_divide_for_ranges_and_ages() -> None:
    rules = rules_of(shortened(_FILE, 40))
    assert (rules["A"].for_seconds, rules["A"].limit_seconds, rules["B"].window_seconds) == (7.5, 7.5, 22.5)
    assert rules["B"].expression.endswith("[22500ms]))) > 60")
    assert _FILE["groups"][0]["rules"][0]["for"] == "5m"
