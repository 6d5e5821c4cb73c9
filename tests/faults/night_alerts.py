"""Alerts of a night: Prometheus with a rule file, what fires now, and what fired when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.faults.night_judgement import Firing
from tests.prometheus import Prometheus, prometheus

_MOST_POINTS = 10_000  # Prometheus returns at most 11,000 a series
_OWN_LABELS = {"__name__", "alertname", "alertstate"}  # of the series ALERTS


@dataclass(frozen=True)
class NightAlerts:
    """Alerts of a server that scrapes and evaluates every `interval` seconds."""

    server: Prometheus
    interval: float

    def firing(self) -> list[dict[str, str]]:
        """Return the labels of the alerts that fire now; the label `alertname` is the name."""
        alerts = self.server.get("alerts")["alerts"]
        return [alert["labels"] for alert in alerts if alert["state"] == "firing"]

    def errors(self) -> list[str]:
        """Return the rules whose latest evaluation failed, with the reason."""
        rules = [rule for group in self.server.get("rules")["groups"] for rule in group["rules"]]
        return [f"{rule['name']}: {rule['lastError']}" for rule in rules if rule.get("lastError")]

    def firings(self, begin: float, end: float) -> list[Firing]:
        """Return for which times each alert fired, to the second."""
        step = max(1.0, (end - begin) / _MOST_POINTS)
        found = []
        for series in self.values('ALERTS{alertstate="firing"}', begin, end, step):
            labels = {name: value for name, value in series["metric"].items() if name not in _OWN_LABELS}
            times = [float(at) for at, _ in series["values"]]
            first = times[0]
            for one, following in zip(times, [*times[1:], float("inf")], strict=True):
                if following - one > 1.5 * step:
                    found.append(Firing(series["metric"]["alertname"], labels, first, one + step))
                    first = following
        return found

    def values(self, expression: str, begin: float, end: float, step: float) -> Any:
        """Return the series of an expression from `begin` to `end`, which may be later than now."""
        times = {"start": f"{begin:.3f}", "end": f"{end:.3f}", "step": f"{step:.3f}"}
        return self.server.get("query_range", query=expression, **times)["result"]


@contextmanager
def night_alerts(
    folder: Path, rules: Mapping[str, Any], targets: Mapping[str, Sequence[str]], *, interval: float
) -> Iterator[NightAlerts]:
    """Run Prometheus with this rule file during the block. `targets` are the addresses to scrape, by job."""
    file = folder.with_name(f"{folder.name}.rules.yaml")
    file.write_text(yaml.safe_dump(dict(rules)), "utf-8")
    every = f"{round(interval * 1000)}ms"
    configuration = {
        "global": {"scrape_interval": every, "evaluation_interval": every, "scrape_timeout": every},
        "rule_files": [str(file)],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": list(addresses)}]} for job, addresses in targets.items()
        ],
    }
    with prometheus(configuration, folder) as server:
        yield NightAlerts(server, interval)
