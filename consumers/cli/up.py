"""The command `trading-history up`: the whole pipeline on one machine."""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import typer

from consumers.embedded.stack import embedded_home, stack
from consumers.web.listening import DASHBOARD_PORT, PAGE_PORT, url_of, usual_or_free_port

_Start = Callable[..., subprocess.Popen[bytes]]


class _WebServer(NamedTuple):
    """A line about a web server for the user, and the function that starts its process; None if it is not installed."""

    line: str
    start: Callable[[], subprocess.Popen[bytes]] | None


def up(context: typer.Context) -> None:
    """Run the history page, RQ Dashboard, a worker, a relay and, if no servers are set, the embedded servers.

    Example: trading-history up
    """
    import consumers.db.engine  # noqa: F401  # if the extra is missing, say so before anything starts
    from consumers.embedded import restart_functions
    from consumers.embedded.child_processes import start_child
    from consumers.embedded.supervisor import Child, WatchedServer, supervise
    from producers.relay_process import check_destinations
    from producers.settings import TransportSettings

    with stack(database=True, redis=True) as is_embedded, ExitStack() as opened:
        home = embedded_home() if is_embedded else None
        start = partial(start_child, debug=context.find_root().params["debug"], embedded_home=home)
        settings = TransportSettings.from_environment()
        os.environ["HISTORY_OUTBOX"] = outbox = os.path.abspath(settings.outbox)
        check_destinations([Path(outbox)], settings.redis(), settings.queue)
        metrics = _metrics_options()
        dashboard = _dashboard(opened, start)  # first, since the page links to it
        page = _page(opened, start)
        children = {
            "history page": page.start,
            "RQ Dashboard": dashboard.start,
            "worker": lambda: start("worker", *metrics),
            "relay": lambda: start("relay", "--outbox", outbox),
        }
        print(page.line, dashboard.line, "", *_exports(is_embedded), "", sep="\n")
        print("Starting a worker and a relay of this outbox. Ctrl-C or SIGTERM stops everything.", flush=True)
        status = supervise(
            [Child(name, start) for name, start in children.items() if start is not None],
            [
                WatchedServer(f"embedded {server.name}", server.process, restart)
                for server, restart in (restart_functions(home) if home else ())
            ],
        )
        raise typer.Exit(status)


def _page(opened: ExitStack, start: _Start) -> _WebServer:
    from consumers.settings import ApiSettings

    if not _installed("fastapi", "httptools", "uvicorn", "youplot"):
        return _not_installed("The history page", "api")
    token = "" if ApiSettings.from_environment().token is None else " - token HISTORY_API_TOKEN"
    listening = opened.enter_context(usual_or_free_port("The history page", PAGE_PORT))
    return _WebServer(f"History page: {url_of(listening)}{token}", _serving("api", listening, start))


def _dashboard(opened: ExitStack, start: _Start) -> _WebServer:
    """Listen for RQ Dashboard. Its password is HISTORY_DASHBOARD_PASSWORD, otherwise a new one for each run."""
    from consumers.settings import DASHBOARD_USER, DashboardSettings

    if not _installed("flask", "rq_dashboard", "six", "waitress"):
        return _not_installed("RQ Dashboard", "dashboard")
    settings = DashboardSettings.from_environment()
    listening = opened.enter_context(usual_or_free_port("RQ Dashboard", DASHBOARD_PORT))
    os.environ["HISTORY_DASHBOARD_URL"] = settings.url or url_of(listening)
    if settings.password is not None:
        password, shown = settings.password.get_secret_value(), "HISTORY_DASHBOARD_PASSWORD"
    else:
        password = shown = secrets.token_urlsafe(18)
    return _WebServer(
        f"RQ Dashboard: {url_of(listening)} - user {DASHBOARD_USER}, password {shown}",
        _serving("dashboard", listening, start, HISTORY_DASHBOARD_PASSWORD=password),
    )


def _serving(command: str, listening: socket.socket, start: _Start, **settings: str) -> _Start:
    """Return the function that starts a web server on this socket.

    This process keeps the socket open: requests wait while the server is started again.
    """
    number = listening.fileno()
    return partial(
        start, command, "--fd", str(number),
        stdout=subprocess.DEVNULL,  # only the address, which is printed here
        pass_fds=[number],
        env={**os.environ, **settings},
    )  # fmt: skip


def _installed(*modules: str) -> bool:
    return all(find_spec(module) is not None for module in modules)


def _not_installed(what: str, extra: str) -> _WebServer:
    return _WebServer(f"{what} is not installed: run pip install '.[{extra}]' in a clone of trading-history", None)


def _metrics_options() -> Sequence[str]:
    """Return the worker's option for its metrics, if HISTORY_METRICS_PORT is set: this port, or a free one."""
    from consumers.settings import MetricsSettings

    settings = MetricsSettings.from_environment()
    if settings.port is None:
        return ()
    with usual_or_free_port("The metrics server", settings.port, settings.host) as listening:
        return (f"--metrics-port={listening.getsockname()[1]}",)


def _exports(is_embedded: bool) -> list[str]:
    """Return the lines that give a controller in another shell the settings of this process."""
    from producers.settings import read_environment

    settings = read_environment()
    own = ("DATABASE_URL", "REDIS_URL") if is_embedded else ()
    names = [*own, *(name for name in ("RQ_KEY_PREFIX", "HISTORY_QUEUE") if name in settings), "HISTORY_OUTBOX"]
    besides = "" if is_embedded else ", besides REDIS_URL"
    return [
        f"For a controller in another shell{besides}:",
        *(f"export {name}={shlex.quote(settings[name])}" for name in names),
    ]
