"""Short storm of random faults. `python -m tests.faults --minutes 20` is the long one."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(400)
def test_no_event_is_lost_or_duplicated_in_a_storm() -> None:
    """Accepted = stored + rejected, each once, and the audit agrees. The output of a failed run has its seed."""
    seed = str(random.randrange(10**6))
    command = [sys.executable, "-m", "tests.faults", "--minutes", "0.3", "--seed", seed]
    storm = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=380, check=False
    )
    assert storm.returncode == 0, storm.stdout + storm.stderr
    assert "0 breaches of the promise" in storm.stdout
    assert "\n0 events accepted" not in storm.stdout
