"""Scrapes of metrics, parsed by Prometheus' own parser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from tests.rq_programs import end, until

PREFIX = "trading_history_"
Scrape = dict[tuple[str, ...], float]


def parsed(text: str) -> Scrape:
    """Return our samples: (name without the prefix, label values in the order of the labels' names) → value."""
    return {
        (sample.name.removeprefix(PREFIX), *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }


def scraped(url: str) -> Scrape:
    with urlopen(url, timeout=10) as answer:
        return parsed(answer.read().decode())


def log_lines(log: Path) -> list[dict[str, object]]:
    """Return the lines of a log, all of which must be JSON."""
    return [json.loads(line) for line in log.read_text().splitlines()]


@contextmanager
def scraped_worker(log: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `trading-history worker` with metrics at a free port during the block. Yields the process and its URL."""
    command = [sys.executable, "-m", "consumers.cli", "worker", "--metrics-port=0", *arguments]
    with log.open("wb") as output:
        worker = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})

    def addresses() -> list[str]:
        return [word for word in log.read_text().replace('"', " ").split() if word.endswith("/metrics")]

    try:
        until(lambda: bool(addresses()), seconds=40)
        yield worker, addresses()[0]
    finally:
        end(worker)
