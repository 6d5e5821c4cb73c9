"""The command `trading-history up`: the whole pipeline on one machine."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from consumers.embedded.stack import stack
from producers.errors import HistoryError


def up() -> None:
    """Run a worker, RQ Dashboard and, if no servers are set, the embedded servers, until Ctrl-C.

    Example: trading-history up
    """
    from consumers.embedded.child_processes import wait_for_worker, worker_process
    from consumers.settings import MetricsSettings

    port = MetricsSettings.from_environment().port
    with (
        stack(database=True, redis=True) as embedded,
        _dashboard() as dashboard_text,
        worker_process(metrics_port=port) as worker,
    ):
        for name in ("DATABASE_URL", "REDIS_URL") if embedded else ():
            print(f"export {name}='{os.environ[name]}'")
        print(dashboard_text)
        print(
            "A worker is running. Paste the export lines into other shells; a controller needs only REDIS_URL."
            " Ctrl-C or SIGTERM stops everything.",
            flush=True,
        )
        wait_for_worker(worker)


@contextmanager
def _dashboard() -> Iterator[str]:
    """Run RQ Dashboard during the block, if it is installed, and yield the lines to print about it.

    The password is HISTORY_DASHBOARD_PASSWORD, otherwise a new one for each run.
    """
    if find_spec("rq_dashboard") is None or find_spec("waitress") is None:
        yield "RQ Dashboard is not installed: run pip install '.[dashboard]' in a clone of trading-history"
        return
    from consumers.embedded.child_processes import dashboard_process
    from consumers.settings import DASHBOARD_USER, DashboardSettings
    from consumers.web.listening import url_of

    settings = DashboardSettings.from_environment()
    listening = _listening()
    os.environ["HISTORY_DASHBOARD_URL"] = url = settings.url or url_of(listening)
    if settings.password is not None:
        password, login = settings.password.get_secret_value(), "password HISTORY_DASHBOARD_PASSWORD"
    else:
        password = secrets.token_urlsafe(18)
        login = f"password {password}"
    dashboard_text = (
        f"export HISTORY_DASHBOARD_URL='{url}'\nRQ Dashboard: {url_of(listening)} - user {DASHBOARD_USER}, {login}"
    )
    with dashboard_process(listening, password):
        yield dashboard_text


def _listening() -> socket.socket:
    """Listen at the usual port, or at any free port if it is taken, for example by another `up`."""
    from consumers.web.listening import DASHBOARD_PORT, listen

    try:
        return listen("127.0.0.1", DASHBOARD_PORT)
    except HistoryError as error:
        print(f"RQ Dashboard uses another port this time: {error}", file=sys.stderr)
        return listen("127.0.0.1", 0)
