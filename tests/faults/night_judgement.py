"""Judgement of a night: each fault raises its alerts in time, they resolve in time, and no other alert fires."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.faults.alert_rules import Rule

REACTION_SECONDS = 5.0  # for scrapes and evaluations that take time on a busy machine
RECOVERY_SECONDS = 60.0  # after a repair: processes start or connect again (pauses up to 30 s), a backlog is stored


@dataclass(frozen=True)
class Expected:
    """An alert that a fault must raise.

    `notice_seconds` pass until the fault can be seen in the metrics. If `is_old`, the rule's limit has passed before.
    """

    alert: str
    labels: Mapping[str, str] = field(default_factory=dict)
    notice_seconds: float = 0.0
    is_old: bool = False

    def matches(self, alert: str, labels: Mapping[str, str]) -> bool:
        return alert == self.alert and self.labels.items() <= labels.items()


@dataclass(frozen=True)
class Happened:
    """A fault that was caused. The repair lasted from `end` until `repaired_at`; all times are in Unix seconds."""

    name: str
    expected: Sequence[Expected]
    consequences: Sequence[str]
    begin: float
    end: float
    repaired_at: float

    def allows(self, alert: str, labels: Mapping[str, str]) -> bool:
        return alert in self.consequences or any(one.matches(alert, labels) for one in self.expected)


@dataclass(frozen=True)
class Firing:
    """Time for which an alert with these labels fired. `is_predicted`: its end is after the last sample."""

    alert: str
    labels: Mapping[str, str]
    begin: float
    end: float
    is_predicted: bool = False


@dataclass(frozen=True)
class Row:
    """A fault and one of its alerts, in seconds. None: it did not fire, or the fault expects no alert."""

    fault: str
    begin: float
    end: float
    alert: str | None
    promised_after: float | None
    fired_after: float | None
    resolved_after: float | None
    is_predicted: bool
    problem: str | None


@dataclass(frozen=True)
class Judgement:
    rows: list[Row]
    false_alerts: list[str]

    @property
    def problems(self) -> list[str]:
        return [f"{row.fault}: {row.problem}" for row in self.rows if row.problem] + self.false_alerts


def promised_seconds(rule: Rule, expected: Expected, interval: float) -> float:
    """Return the time from a fault until its alert must fire: a scrape and an evaluation take an interval each."""
    limit = 0.0 if expected.is_old else rule.limit_seconds
    return limit + rule.for_seconds + expected.notice_seconds + 2 * interval + REACTION_SECONDS


def resolved_seconds(rule: Rule, interval: float) -> float:
    """Return the time from the repair until its alert is resolved at the latest."""
    return rule.window_seconds + RECOVERY_SECONDS + 2 * interval


def check_script(alerts: Iterable[str], rules: Mapping[str, Rule]) -> None:
    """Check that the faults raise the alerts of the rule file: each of them, and no others.

    Raises:
        ValueError: a rule has no fault, or an alert no rule.
    """
    raised = set(alerts)
    if missing := rules.keys() - raised:
        raise ValueError(
            f"no fault of the night raises {', '.join(sorted(missing))}: add one to tests/faults/night_script.py"
        )
    if unknown := raised - rules.keys():
        raise ValueError(f"the night expects {', '.join(sorted(unknown))}, which the rule file does not have")


def judge(
    happened: Sequence[Happened], firings: Sequence[Firing], rules: Mapping[str, Rule], *, interval: float
) -> Judgement:
    """Compare the faults with the alerts. A fault's own alert may not fire before it, nor end before its repair."""
    rows = list(_rows(happened, firings, rules, interval))
    false = [_false(firing, happened, rules[firing.alert], interval) for firing in firings]
    return Judgement(rows, [one for one in false if one])


def _rows(
    happened: Sequence[Happened], firings: Sequence[Firing], rules: Mapping[str, Rule], interval: float
) -> Iterator[Row]:
    for fault in happened:
        if not fault.expected:
            yield Row(fault.name, fault.begin, fault.end, None, None, None, None, False, None)
        for expected in fault.expected:
            rule = rules[expected.alert]
            promised = promised_seconds(rule, expected, interval)
            found = _first(fault, expected, firings, interval)
            fired_after = None if found is None else found.begin - fault.begin
            resolved_after = None if found is None else found.end - _last_repair(found, fault, happened)
            yield Row(
                fault.name, fault.begin, fault.end, _named(expected.alert, expected.labels), promised,
                fired_after, resolved_after, found is not None and found.is_predicted,
                _problem(fault, expected, found, promised),
            )  # fmt: skip


def _first(fault: Happened, expected: Expected, firings: Sequence[Firing], interval: float) -> Firing | None:
    """Return the first firing of this alert after the fault began; firings of several instances count as one."""
    matching = sorted(
        (one for one in firings if expected.matches(one.alert, one.labels) and fault.begin <= one.begin),
        key=lambda one: one.begin,
    )
    if not matching:
        return None
    first = matching[0]
    begin, end, predicted = first.begin, first.end, first.is_predicted
    for one in matching[1:]:
        if one.begin <= end + interval:
            end, predicted = max(end, one.end), predicted or one.is_predicted
    return Firing(first.alert, first.labels, begin, end, predicted)


def _last_repair(firing: Firing, fault: Happened, happened: Sequence[Happened]) -> float:
    """Return the time of the last repair before the end of a firing, of this fault or of another one that allows it."""
    allowing = [one.repaired_at for one in happened if one.allows(firing.alert, firing.labels)]
    return max((at for at in allowing if at <= firing.end), default=fault.repaired_at)


def _problem(fault: Happened, expected: Expected, found: Firing | None, promised: float) -> str | None:
    name = _named(expected.alert, expected.labels)
    if found is None:
        return f"{name} did not fire"
    if found.begin > fault.begin + promised:
        return f"{name} fired after {found.begin - fault.begin:.0f} s instead of {promised:.0f} s"
    if found.end < fault.end:
        return f"{name} ended {fault.end - found.end:.0f} s before the repair"
    return None


def _false(firing: Firing, happened: Sequence[Happened], rule: Rule, interval: float) -> str | None:
    """Return why a firing is false, or was resolved too late.

    It may fire from the beginning of a fault that allows it until its time to resolve is over. If another such fault
    begins before, its time counts.
    """
    periods = sorted(
        (fault.begin, fault.repaired_at + resolved_seconds(rule, interval), fault.name)
        for fault in happened
        if fault.allows(firing.alert, firing.labels)
    )
    name = _named(firing.alert, firing.labels)
    until, cause = None, ""
    for begin, end, fault in periods:
        if begin <= firing.begin <= end or (until is not None and begin <= until):
            cause = fault if until is None or end > until else cause
            until = max(until or end, end)
    if until is None:
        return f"false alert: {name} fired for {firing.end - firing.begin:.0f} s without a fault"
    if firing.end > until:
        return f"{name} was resolved {firing.end - until:.0f} s too late after the fault {cause}"
    return None


def _named(alert: str, labels: Mapping[str, str]) -> str:
    shown = ", ".join(f"{name}={value}" for name, value in sorted(labels.items()) if name not in {"alertname", "job"})
    return f"{alert}{{{shown}}}" if shown else alert
