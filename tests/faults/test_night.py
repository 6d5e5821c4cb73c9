"""Short night: three faults, with shorter times in the alert rules. `python -m tests.faults night` is the whole one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(240)
def test_each_fault_of_a_short_night_raises_its_alert_and_no_other_fires(tmp_path: Path) -> None:
    """Prometheus evaluates the rules of consumers/deploy/alerts.yaml over scrapes of real processes."""
    file = tmp_path / "night.json"
    command = [sys.executable, "-m", "tests.faults", "night", "--site", "short", "--seed", "7", "--json", str(file)]
    night = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=230, check=False
    )
    assert night.returncode == 0, night.stdout + night.stderr
    result = json.loads(file.read_text())
    alerts = {row["alert"].partition("{")[0] for row in result["judgement"]["rows"]}
    assert {"HistoryHasFailedJobs", "HistoryWorkerWaits", "PortfolioHasNoNewSnapshot"} <= alerts
    assert (result["problems"], result["verdict"]["rejected"]) == ([], 1)
    assert result["verdict"]["accepted"] > 20
