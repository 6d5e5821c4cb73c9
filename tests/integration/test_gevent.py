"""A controller with gevent's patches, as in some bots: its calls work, and each event is stored once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

from consumers.operations import get_portfolio_history
from tests.deliveries import burst

pytestmark = pytest.mark.usefixtures("database_url")

_CONTROLLER = """
from gevent import monkey
monkey.patch_all()
import gevent
from producers.trading_controller import create_daily_portfolio_snapshot, shared_producer

def record(number):
    return create_daily_portfolio_snapshot({"balance": number, "total_value": number}, portfolio_id=number)

jobs = [gevent.spawn(record, number) for number in range(20)]
gevent.joinall(jobs, raise_error=True)
assert shared_producer().flush(20) == 0
print("sent", flush=True)
input()
print({type(job.value.wait(20)).__name__ for job in jobs}, flush=True)
"""


def test_a_controller_with_gevents_patches_records_and_closes(redis: Redis, tmp_path: Path) -> None:
    """Greenlets record at the same time, the relay's thread is a greenlet too, and the process ends by itself."""
    command = [sys.executable, "-c", _CONTROLLER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as controller:
        assert controller.stdin is not None
        assert controller.stdout is not None
        assert controller.stdout.readline() == "sent\n"
        burst(redis)
        output, _ = controller.communicate("\n", timeout=30)
    assert (controller.returncode, output) == (0, "{'int'}\n")
    assert sorted(row["portfolio_id"] for row in get_portfolio_history(50)) == list(range(20))
