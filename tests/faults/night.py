"""A night: the faults of a script, while Prometheus scrapes the pipeline and evaluates its alert rules.

Two sites, each a pipeline with its own Prometheus, share the faults, which would take an hour one after the other. A
fault begins in a quiet phase, or beside faults with other alerts. It is repaired as soon as its alerts fire, or when
they are too late.
"""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import yaml

from consumers.embedded.stack import embedded_stack
from tests.faults.alert_rules import Rule, rules_of, shortened
from tests.faults.night_alerts import NightAlerts, night_alerts
from tests.faults.night_judgement import (
    RECOVERY_SECONDS,
    Firing,
    Happened,
    Judgement,
    check_script,
    judge,
    promised_seconds,
    resolved_seconds,
)
from tests.faults.night_pipeline import Pipeline
from tests.faults.night_script import SCRIPT, SITES, Fault
from tests.faults.supervisor import ROOT
from tests.faults.verdict import Verdict

logger = logging.getLogger(__name__)

RULES = ROOT / "consumers" / "deploy" / "alerts.yaml"
_TOO_LATE_SECONDS = 20.0  # a fault whose alert is late lasts so much longer, to see when it fires
_TICK_SECONDS = 0.5
_NIGHT_SECONDS = 1800.0
_INTERVAL = 5.0  # between two scrapes, and between two evaluations
_SHORT_DIVISOR = 40.0  # of the times of a short night
_SHORT_INTERVAL = 2.0  # a scrape may take 2 s
_LIMIT_SECONDS = 3600
_SHORT_LIMIT_SECONDS = 200
_LONG_WINDOW_SECONDS = 600.0  # no fault waits until an alert is resolved whose rule has such a range


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
    """Result of one site."""

    site: str
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
        counts = {name: dict(counter) for name, counter in self.verdict.by_controller.items()}
        judged = asdict(replace(self.verdict, by_controller={})) | {"by_controller": counts}
        others = asdict(replace(self, verdict=replace(self.verdict, by_controller={})))
        return json.dumps(others | {"verdict": judged, "problems": self.problems}, indent=2)


class Night:
    """Runs the script. `divisor` shortens the quiet phases."""

    def __init__(
        self,
        script: Sequence[Fault],
        pipeline: Pipeline,
        alerts: NightAlerts,
        rules: dict[str, Rule],
        divisor: float,
    ) -> None:
        self._script, self._pipeline, self._alerts, self._rules = script, pipeline, alerts, rules
        self._divisor = divisor
        self._progress = {fault.name: _Progress() for fault in script}
        self._firing: list[dict[str, str]] = []
        self.rule_errors: list[str] = []
        self.begin = time.time()

    def run(self, least_seconds: float) -> None:
        """Cause all faults, and then wait until `least_seconds` have passed since the begin."""
        while any(one.over_at is None for one in self._progress.values()) or time.time() < self.begin + least_seconds:
            self._pipeline.tick()
            self._read_alerts()
            for fault in self._script:
                self._continue(fault)
            time.sleep(_TICK_SECONDS)

    def _read_alerts(self) -> None:
        try:
            self._firing = self._alerts.firing()
            self.rule_errors += [error for error in self._alerts.errors() if error not in self.rule_errors]
        except (URLError, TimeoutError) as error:
            raise RuntimeError(f"Prometheus does not answer: {error}") from error

    def _continue(self, fault: Fault) -> None:
        one, now = self._progress[fault.name], time.time()
        if one.begin is None:
            if self._may_begin(fault, now):
                one.begin = fault.begin(self._pipeline) or now
                logger.info("%s %s", _clock(now - self.begin), fault.name)
        elif one.end is None:
            self._note_alerts(fault, one)
            if self._may_be_repaired(fault, one, now):
                one.end = now
                fault.repair(self._pipeline)
                one.repaired_at = time.time()
                logger.info("%s repaired: %s", _clock(one.repaired_at - self.begin), fault.name)
        elif one.over_at is None and self._is_over(fault, one, now):
            one.over_at = now

    def _note_alerts(self, fault: Fault, one: _Progress) -> None:
        for number, expected in enumerate(fault.expected):
            if any(expected.matches(labels["alertname"], labels) for labels in self._firing):
                one.fired.add(number)

    def _may_begin(self, fault: Fault, now: float) -> bool:
        if fault.during is not None:
            return self._has_fired(next(one for one in self._script if one.name == fault.during), now)
        over = [self._progress[name].over_at for name in fault.after]
        times = [at for at in over if at is not None]
        return len(times) == len(over) and now >= max(times, default=self.begin) + fault.quiet_seconds / self._divisor

    def _may_be_repaired(self, fault: Fault, one: _Progress, now: float) -> bool:
        assert one.begin is not None
        return (
            self._has_fired(fault, now)
            and now >= one.begin + fault.least_seconds / self._divisor
            and all(self._progress[name].repaired_at is not None for name in fault.outlasts)
        )

    def _has_fired(self, fault: Fault, now: float) -> bool:
        """Return whether each alert of a fault has fired, or is too late."""
        one = self._progress[fault.name]
        if one.begin is None:
            return False
        promised = [promised_seconds(self._rules[each.alert], each, self._alerts.interval) for each in fault.expected]
        too_late = now > one.begin + max(promised, default=0.0) + _TOO_LATE_SECONDS / self._divisor
        return len(one.fired) == len(fault.expected) or too_late

    def _is_over(self, fault: Fault, one: _Progress, now: float) -> bool:
        """Return whether the fault's alerts are resolved, without those whose range is long, or should be."""
        assert one.repaired_at is not None
        if now > one.repaired_at + RECOVERY_SECONDS:
            return True
        rules = [self._rules[name] for name in (*fault.consequences, *(each.alert for each in fault.expected))]
        short = {rule.name for rule in rules if rule.window_seconds < _LONG_WINDOW_SECONDS / self._divisor}
        others = [each for each in self._script if each is not fault and self._is_active(each)]
        return (
            not any(
                labels["alertname"] in short and not any(_allows(each, labels) for each in others)
                for labels in self._firing
            )
            and now > one.repaired_at + 2 * self._alerts.interval
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
            found.append(Happened(fault.name, fault.expected, fault.consequences, one.begin, one.end, one.repaired_at))
        return sorted(found, key=lambda one: one.begin)


def _allows(fault: Fault, labels: dict[str, str]) -> bool:
    name = labels["alertname"]
    return name in fault.consequences or any(one.matches(name, labels) for one in fault.expected)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02}:{int(seconds) % 60:02}"


def run_night(home: Path, *, site: str, seed: int) -> NightResult:
    """Run one site of the night in the empty folder `home`, and judge it. The rules of the site `short` are shortened.

    Raises:
        ValueError: a rule of the rule file has no fault, or an alert of the script no rule.
    """
    document = yaml.safe_load(RULES.read_text("utf-8"))
    check_script([one.alert for fault in SCRIPT for one in fault.expected], rules_of(document))
    divisor, interval = (_SHORT_DIVISOR, _SHORT_INTERVAL) if site == "short" else (1.0, _INTERVAL)
    rules = rules_of(document := shortened(document, divisor))
    with ExitStack() as stack:
        stack.enter_context(embedded_stack(home))
        pipeline = Pipeline(home, random.Random(seed), has_spare_outbox=site == "first")
        stack.enter_context(pipeline.running())
        alerts = stack.enter_context(night_alerts(home / "prometheus", document, pipeline.targets, interval=interval))
        night = Night(SITES[site], pipeline, alerts, rules, divisor)
        night.run(0.0 if site == "short" else _NIGHT_SECONDS)
        end = time.time()
        happened = night.happened()
        firings = [_predicted(one, end, happened, rules, alerts) for one in alerts.firings(night.begin - 60, end)]
        judgement = judge(happened, firings, rules, interval=interval)
        judged = pipeline.verdict()
    return NightResult(site, seed, night.begin, end, happened, firings, judgement, judged, night.rule_errors)


def _predicted(
    firing: Firing, end: float, happened: Sequence[Happened], rules: dict[str, Rule], alerts: NightAlerts
) -> Firing:
    """Return a firing that lasts until the end of the night with its end in the future, if its rule has a range.

    A range that begins later in the night and ends after it has samples of the night only: those of a process that
    continues to count nothing more.
    """
    rule = rules[firing.alert]
    causes = [one.repaired_at for one in happened if one.allows(firing.alert, firing.labels)]
    if firing.end <= end or not rule.window_seconds or not causes:
        return firing
    until = max(causes) + resolved_seconds(rule, alerts.interval)
    step = max(alerts.interval, (until - end) / 2000)
    series = alerts.values(rule.expression, end, until + 2 * step, step)
    true_at = [float(at) for one in series for at, _ in one["values"]]
    predicted = max(true_at, default=end) + step
    return Firing(firing.alert, firing.labels, firing.begin, predicted, is_predicted=True)


def end_in_time(site: str | None) -> None:
    """Raise an exception in this process at SIGTERM, and when a site (None: both) has lasted too long."""

    def too_long(*_: object) -> NoReturn:
        raise TimeoutError(f"the night did not end in time (site: {site or 'both'})")

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm({"short": _SHORT_LIMIT_SECONDS, None: _LIMIT_SECONDS + 120}.get(site, _LIMIT_SECONDS))


def run_sites(*, seed: int, file: Path | None) -> list[str]:
    """Run both sites of a night as processes. Write their results to `file`, and return the problems."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        started = []
        for site in ("first", "second"):
            command = [sys.executable, "-m", "tests.faults", "night", "--site", site, "--seed", str(seed)]
            written = Path(folder, f"{site}.json")
            process = subprocess.Popen([*command, "--json", str(written)], cwd=ROOT)
            stack.callback(_end, process)
            started.append((site, process, written))
        for site, process, written in started:
            process.wait()
            results[site] = (
                json.loads(written.read_text()) if written.exists() else {"problems": [f"{site}: no result"]}
            )
    if file is not None:
        file.write_text(json.dumps(results, indent=2))
    return [problem for result in results.values() for problem in result["problems"]]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def table_of(result: NightResult) -> str:
    """Return the result as text: a table of the faults, then the counts."""
    lines = [
        (
            f"fault (site {result.site}, seed {result.seed})",
            "begin",
            "end",
            "alert",
            "promised",
            "fired after",
            "resolved after",
        )
    ]
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
    if any(row.is_predicted for row in result.judgement.rows):
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
    consequences = {
        one.alert
        for one in result.firings
        if not any(each.matches(one.alert, one.labels) for fault in result.happened for each in fault.expected)
    }
    text.append(f"alerts that only a consequence of a fault raised: {', '.join(sorted(consequences)) or 'none'}")
    text.append(f"{len(result.judgement.false_alerts)} false or unresolved alerts, {len(result.problems)} problems")
    return "\n".join(text + [f"  {problem}" for problem in result.problems[:30]])
