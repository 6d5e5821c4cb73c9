"""A Prometheus server on loopback for a test: its configuration, its alerts and its queries."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from tests.faults.night_judgement import Firing
from tests.ports import free_port

PROGRAM = Path("/usr/bin/prometheus")
_START_SECONDS = 30.0
_OWN_LABELS = {"__name__", "alertname", "alertstate"}  # of the series ALERTS
_MOST_POINTS = 10_000  # Prometheus returns at most 11,000 a series


@dataclass(frozen=True)
class PrometheusServer:
    """A running server. `interval` is the time between two scrapes, and between two evaluations, in seconds."""

    address: str
    interval: float

    def firing(self) -> list[dict[str, str]]:
        """Return the labels of the alerts that fire now; the label `alertname` is the name."""
        alerts = self._get("alerts")["alerts"]
        return [alert["labels"] for alert in alerts if alert["state"] == "firing"]

    def errors(self) -> list[str]:
        """Return the rules whose latest evaluation failed, with the reason."""
        groups = self._get("rules")["groups"]
        return [
            f"{one['name']}: {one['lastError']}" for group in groups for one in group["rules"] if one.get("lastError")
        ]

    def firings(self, begin: float, end: float) -> list[Firing]:
        """Return for which times each alert fired, to the second."""
        step = max(1.0, (end - begin) / _MOST_POINTS)
        found = []
        for series in self.query_range('ALERTS{alertstate="firing"}', begin, end, step):
            labels = {name: value for name, value in series["metric"].items() if name not in _OWN_LABELS}
            times = [float(at) for at, _ in series["values"]]
            first = times[0]
            for one, following in zip(times, [*times[1:], float("inf")], strict=True):
                if following - one > 1.5 * step:
                    found.append(Firing(series["metric"]["alertname"], labels, first, one + step))
                    first = following
        return found

    def query_range(self, expression: str, begin: float, end: float, step: float) -> Any:
        query = {"query": expression, "start": f"{begin:.3f}", "end": f"{end:.3f}", "step": f"{step:.3f}"}
        return self._get("query_range", query)["result"]

    def _get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        url = f"{self.address}/api/v1/{path}" + (f"?{urlencode(query)}" if query else "")
        with urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]


@contextmanager
def prometheus(
    folder: Path, rules: Mapping[str, Any], targets: Mapping[str, Sequence[str]], *, interval: float
) -> Iterator[PrometheusServer]:
    """Run Prometheus with this rule file during the block. `targets` are the addresses to scrape, by job.

    Raises:
        RuntimeError: It is not installed, or it does not start.
    """
    if not PROGRAM.exists():
        raise RuntimeError(f"{PROGRAM} is missing: apt-get install --no-install-recommends prometheus")
    folder.mkdir()
    every = f"{round(interval * 1000)}ms"
    configuration = {
        "global": {"scrape_interval": every, "evaluation_interval": every, "scrape_timeout": every},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": list(addresses)}]} for job, addresses in targets.items()
        ],
    }
    (folder / "alerts.yaml").write_text(yaml.safe_dump(dict(rules)))
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    command = [str(PROGRAM), "--config.file=prometheus.yaml", "--storage.tsdb.path=data", "--log.level=warn"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], cwd=folder, stdout=log, stderr=log,
            env={"PATH": os.defpath, "GOMAXPROCS": "1"},
        )  # fmt: skip
    try:
        _wait_until_ready(process, address, folder / "log")
        yield PrometheusServer(f"http://{address}", interval)
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            with urlopen(f"http://{address}/-/ready", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"Prometheus does not start: {log.read_text()}")
