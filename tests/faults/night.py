"""A night: the faults of a script, while Prometheus scrapes the pipeline and evaluates its alert rules.

Each fault begins in a quiet phase, and is repaired as soon as its alerts fire, or when they are too late.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from urllib.error import URLError

import yaml

from consumers.embedded.stack import embedded_stack
from tests.faults.alert_rules import Rule, rules_of, shortened
from tests.faults.night_judgement import (
    RECOVERY_SECONDS,
    Expected,
    Firing,
    Happened,
    Judgement,
    check_script,
    judge,
    promised_seconds,
    resolved_seconds,
)
from tests.faults.night_pipeline import Pipeline
from tests.faults.prometheus_server import PrometheusServer, prometheus
from tests.faults.supervisor import ROOT
from tests.faults.verdict import Verdict

RULES = ROOT / "consumers" / "deploy" / "alerts.yaml"
_LEASE_SECONDS = 30.0  # a lease ends after 20 s, and another worker notices it within 6 s
_TOO_LATE_SECONDS = 20.0  # a fault whose alert is late lasts so much longer, to see when it fires
_TICK_SECONDS = 0.5
LIMIT_SECONDS = 3600
SHORT_LIMIT_SECONDS = 150
"""A night that takes longer ends with an error."""


@dataclass(frozen=True)
class Fault:
    """A fault of the script.

    It begins `quiet_seconds` after the faults `after` are over, or, for a fault `during` another one, when the alerts
    of that one fire. It is repaired when its alerts fire, `least_seconds` have passed and the faults `outlasts` are
    repaired. The alerts of `consequences` may fire too.
    """

    name: str
    begin: Callable[[Pipeline], object]
    repair: Callable[[Pipeline], object]
    expected: tuple[Expected, ...] = ()
    consequences: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    during: str | None = None
    outlasts: tuple[str, ...] = ()
    quiet_seconds: float = 20.0
    least_seconds: float = 0.0


_LATE = "HistoryEventsAreLate"
_OUTBOX = "HistoryOutboxIsLate"

SCRIPT = (
    Fault(
        "events late",
        Pipeline.start_late_controller,
        Pipeline.stop_late_controller,
        (Expected(_LATE, notice_seconds=5),),
        quiet_seconds=40,
    ),
    Fault(
        "an event rejected",
        Pipeline.record_a_conflict,
        Pipeline.discard_rejected,
        (Expected("HistoryHasFailedJobs"),),
        quiet_seconds=30,
    ),
    Fault(
        "portfolio without a new snapshot",
        Pipeline.record_an_old_snapshot,
        Pipeline.record_a_new_snapshot,
        (Expected("PortfolioHasNoNewSnapshot", {"portfolio_id": "6"}, is_old=True),),
        quiet_seconds=35,
    ),
    Fault(
        "worker killed with reserved jobs",
        Pipeline.kill_a_worker_with_reserved_jobs,
        lambda _: None,  # the pool has started another worker
        (Expected("HistoryWorkerCrashed", notice_seconds=_LEASE_SECONDS),),
        after=("an event rejected", "portfolio without a new snapshot"),
        quiet_seconds=10,
    ),
    Fault(
        "all workers stopped",
        Pipeline.stop_workers,
        Pipeline.start_workers,
        (Expected("HistoryHasNoWorker", notice_seconds=5),),  # they finish their batches first
        (_LATE, "HistoryQueueIsLate", _OUTBOX),
        after=("worker killed with reserved jobs",),
    ),
    Fault(
        "database stopped",
        Pipeline.stop_database,
        lambda pipeline: pipeline.servers.bring_back(),
        (
            Expected("HistoryWorkerWaits", {"for": "the database"}, notice_seconds=5),
            Expected("HistoryCannotBeRead", notice_seconds=5),
        ),
        (_LATE, "HistoryQueueIsLate", _OUTBOX),
        after=("all workers stopped",),
    ),
    Fault(
        "relay killed, controllers only record",
        Pipeline.kill_relay,
        Pipeline.start_relay,
        (Expected(_OUTBOX, {"job": "trading-history-api"}, notice_seconds=15),),  # until the next controller from cron
        (_LATE,),
        after=("all workers stopped",),
        outlasts=("Redis stopped",),
    ),
    Fault(
        "Redis stopped",
        Pipeline.stop_redis,
        lambda pipeline: pipeline.servers.bring_back(),
        (
            Expected("HistoryWorkerWaits", {"for": "Redis"}, notice_seconds=5),
            Expected("HistoryCannotBeRead", notice_seconds=5),
            Expected("HistoryHasNoWorker", notice_seconds=5),  # the number of workers is in Redis
        ),
        (_LATE, "HistoryQueueIsLate", _OUTBOX),
        after=("database stopped",),
        outlasts=("database stopped too",),
    ),
    Fault(
        "database stopped too",
        Pipeline.stop_database,
        lambda pipeline: pipeline.servers.bring_back(),
        (),
        ("HistoryWorkerWaits", "HistoryCannotBeRead", "HistoryHasNoWorker", _LATE, "HistoryQueueIsLate", _OUTBOX),
        during="Redis stopped",
        least_seconds=15,
    ),
    Fault(
        "workers paused",
        Pipeline.pause_workers,
        Pipeline.resume_workers,
        (Expected("HistoryQueueIsLate", notice_seconds=5),),
        (_LATE, _OUTBOX, "HistoryHasNoWorker"),  # a worker stopped by SIGSTOP leaves RQ's list after 2 minutes
        after=("Redis stopped", "relay killed, controllers only record"),
    ),
    Fault(
        "API killed",
        Pipeline.kill_api,
        Pipeline.start_api,
        (),
        after=("all workers stopped",),
        least_seconds=30,
    ),
)
SHORT_SCRIPT = ("an event rejected", "portfolio without a new snapshot", "database stopped")
"""Faults of a short night, whose rules are shortened."""


@dataclass
class _Progress:
    """State of one fault in a running night. Times are in Unix seconds."""

    begin: float | None = None
    end: float | None = None
    repaired_at: float | None = None
    over_at: float | None = None
    fired: set[int] = field(default_factory=set)  # indexes of its expected alerts


@dataclass
class NightResult:
    """Result of a night. `labels` name what was chosen at random."""

    seed: int
    begin: float
    end: float
    happened: list[Happened]
    firings: list[Firing]
    judgement: Judgement
    verdict: Verdict
    rule_errors: list[str]

    @property
    def problems(self) -> list[str]:
        errors = [f"a rule could not be evaluated: {error}" for error in self.rule_errors]
        return [*self.judgement.problems, *errors, *self.verdict.breaches]

    def as_json(self) -> str:
        return json.dumps(asdict(self) | {"problems": self.problems}, indent=2, default=str)


class Night:
    """Runs the script. `divisor` shortens the quiet phases."""

    def __init__(
        self,
        script: Sequence[Fault],
        pipeline: Pipeline,
        server: PrometheusServer,
        rules: dict[str, Rule],
        divisor: float,
    ) -> None:
        self._script, self._pipeline, self._server, self._rules = script, pipeline, server, rules
        self._divisor = divisor
        self._progress = {fault.name: _Progress() for fault in script}
        self._names = {fault.name: fault.name for fault in script}
        self._firing: list[dict[str, str]] = []
        self.rule_errors: list[str] = []
        self.begin = time.time()

    def run(self, least_seconds: float, report: Callable[[str], None]) -> None:
        """Cause all faults, and then wait until `least_seconds` have passed since the begin."""
        while any(one.over_at is None for one in self._progress.values()) or time.time() < self.begin + least_seconds:
            self._pipeline.tick()
            self._read_alerts()
            for fault in self._script:
                self._continue(fault, report)
            time.sleep(_TICK_SECONDS)

    def _read_alerts(self) -> None:
        try:
            self._firing = self._server.firing()
            self.rule_errors += [error for error in self._server.errors() if error not in self.rule_errors]
        except (URLError, TimeoutError) as error:
            raise RuntimeError(f"Prometheus does not answer: {error}") from error

    def _continue(self, fault: Fault, report: Callable[[str], None]) -> None:
        one, now = self._progress[fault.name], time.time()
        if one.begin is None:
            if self._may_begin(fault, now):
                one.begin = now
                chosen = fault.begin(self._pipeline)
                if isinstance(chosen, str):
                    self._names[fault.name] = f"{fault.name}: {chosen}"
                report(f"{_clock(now - self.begin)} {self._names[fault.name]}")
        elif one.end is None:
            self._note_alerts(fault, one)
            if self._may_be_repaired(fault, one, now):
                one.end = now
                fault.repair(self._pipeline)
                one.repaired_at = time.time()
                report(f"{_clock(one.repaired_at - self.begin)} repaired: {fault.name}")
        elif one.over_at is None and self._is_over(fault, one, now):
            one.over_at = now

    def _note_alerts(self, fault: Fault, one: _Progress) -> None:
        for number, expected in enumerate(fault.expected):
            if any(expected.matches(labels["alertname"], labels) for labels in self._firing):
                one.fired.add(number)

    def _may_begin(self, fault: Fault, now: float) -> bool:
        if fault.during is not None:
            outer = next(one for one in self._script if one.name == fault.during)
            return len(self._progress[fault.during].fired) == len(outer.expected)
        over = [self._progress[name].over_at for name in fault.after]
        times = [at for at in over if at is not None]
        return len(times) == len(over) and now >= max(times, default=self.begin) + fault.quiet_seconds / self._divisor

    def _may_be_repaired(self, fault: Fault, one: _Progress, now: float) -> bool:
        assert one.begin is not None
        promised = [promised_seconds(self._rules[each.alert], each, self._server.interval) for each in fault.expected]
        too_late = now > one.begin + max(promised, default=0.0) + _TOO_LATE_SECONDS / self._divisor
        return (
            (len(one.fired) == len(fault.expected) or too_late)
            and now >= one.begin + fault.least_seconds / self._divisor
            and all(self._progress[name].repaired_at is not None for name in fault.outlasts)
        )

    def _is_over(self, fault: Fault, one: _Progress, now: float) -> bool:
        """Return whether the fault's alerts are resolved, without those whose range is long, or should be."""
        assert one.repaired_at is not None
        if now > one.repaired_at + RECOVERY_SECONDS:
            return True
        rules = [self._rules[name] for name in (*fault.consequences, *(each.alert for each in fault.expected))]
        short = {rule.name for rule in rules if not rule.window_seconds}
        others = [each for each in self._script if each is not fault and self._is_active(each)]
        return (
            not any(
                labels["alertname"] in short and not any(_allows(each, labels) for each in others)
                for labels in self._firing
            )
            and now > one.repaired_at + 2 * self._server.interval
        )

    def _is_active(self, fault: Fault) -> bool:
        one = self._progress[fault.name]
        return one.begin is not None and one.over_at is None

    def happened(self) -> list[Happened]:
        """Return the faults with their times, in the order of their beginnings."""
        found = []
        for fault in self._script:
            one = self._progress[fault.name]
            assert one.begin is not None
            assert one.end is not None
            assert one.repaired_at is not None
            found.append(
                Happened(
                    self._names[fault.name], fault.expected, fault.consequences, one.begin, one.end, one.repaired_at
                )
            )
        return sorted(found, key=lambda one: one.begin)


def _allows(fault: Fault, labels: dict[str, str]) -> bool:
    name = labels["alertname"]
    return name in fault.consequences or any(one.matches(name, labels) for one in fault.expected)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02}:{int(seconds) % 60:02}"


def run_night(
    home: Path, *, seed: int, short: bool = False, interval: float = 5.0, report: Callable[[str], None] = print
) -> NightResult:
    """Run the night in the empty folder `home`, and judge it. A short one has the faults of SHORT_SCRIPT.

    Raises:
        ValueError: a rule of the rule file has no fault, or a fault has no rule.
    """
    document = yaml.safe_load(RULES.read_text("utf-8"))
    check_script([one.alert for fault in SCRIPT for one in fault.expected], rules_of(document))
    divisor = 40.0 if short else 1.0
    script = [fault for fault in SCRIPT if not short or fault.name in SHORT_SCRIPT]
    if short:
        document = shortened(document, divisor)
        script = [_without_others(fault) for fault in script]
    rules = rules_of(document)
    with ExitStack() as stack:
        stack.enter_context(embedded_stack(home))
        pipeline = Pipeline(home, random.Random(seed))
        stack.enter_context(pipeline.running())
        server = stack.enter_context(prometheus(home / "prometheus", document, pipeline.targets, interval=interval))
        night = Night(script, pipeline, server, rules, divisor)
        night.run(0.0 if short else 1800.0, report)
        end = time.time()
        happened = night.happened()
        firings = [_predicted(one, end, happened, rules, server) for one in server.firings(night.begin - 60, end)]
        judgement = judge(happened, firings, rules, interval=interval)
        judged = pipeline.verdict()
    return NightResult(seed, night.begin, end, happened, firings, judgement, judged, night.rule_errors)


def _without_others(fault: Fault) -> Fault:
    return replace(fault, after=tuple(name for name in fault.after if name in SHORT_SCRIPT))


def _predicted(
    firing: Firing, end: float, happened: Sequence[Happened], rules: dict[str, Rule], server: PrometheusServer
) -> Firing:
    """Return a firing that lasts until the end of the night with its end in the future, if its rule has a range.

    A range that begins later in the night and ends after it has samples of the night only: those of a process that
    continues to count nothing more.
    """
    rule = rules[firing.alert]
    if firing.end < end - 2 * server.interval or not rule.window_seconds:
        return firing
    last = max(one.repaired_at for one in happened if one.allows(firing.alert, firing.labels))
    until = last + resolved_seconds(rule, server.interval)
    step = max(server.interval, (until - end) / 2000)
    series = server.query_range(rule.expression, end, until + 2 * step, step)
    true_at = [float(at) for one in series for at, _ in one["values"]]
    predicted = max(true_at, default=end) + step
    return Firing(firing.alert, firing.labels, firing.begin, predicted, is_predicted=True)


def table_of(result: NightResult) -> str:
    """Return the result as text: a table of the faults, then the counts."""
    lines = [("fault", "begin", "end", "alert", "promised", "fired after", "resolved after")]
    for row in result.judgement.rows:
        resolved = "" if row.resolved_after is None else f"{row.resolved_after:.0f} s"
        lines.append((
            row.fault, _clock(row.begin - result.begin), _clock(row.end - result.begin), row.alert or "none",
            "" if row.promised_after is None else f"{row.promised_after:.0f} s",
            "" if row.fired_after is None else f"{row.fired_after:.0f} s",
            resolved + (" *" if row.is_predicted else ""),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.append("* computed from the night's samples, for a time after the night: the range of the rule is long")
    alerts = {row.alert for row in result.judgement.rows if row.alert}
    text.append(
        f"{len(result.happened)} faults, {len(alerts)} expected alerts in {_clock(result.end - result.begin)} min"
    )
    judged = result.verdict
    text.append(
        f"{judged.accepted} events accepted: {judged.rows} rows, {judged.duplicate} duplicates,"
        f" {judged.rejected} rejected"
    )
    text.append(f"{len(result.judgement.false_alerts)} false or unresolved alerts, {len(result.problems)} problems")
    return "\n".join(text + [f"  {problem}" for problem in result.problems[:30]])
