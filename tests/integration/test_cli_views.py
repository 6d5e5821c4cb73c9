"""The server of `api`, `status --watch`, and tables in windows of any width."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice

import httpx
import pytest
from redis import Redis

from consumers.operations import insert_portfolio_history_snapshot, insert_signal_archive
from tests.factories import INSTANT, a_signal
from tests.rq_programs import end

PROGRAM = [sys.executable, "-m", "consumers.cli"]


@contextmanager
def _serving(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `trading-history api` during the block. Yields the process and its URL."""
    server = subprocess.Popen(
        [*PROGRAM, "api", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert server.stdout is not None
        yield server, server.stdout.readline().partition("/ - ")[0]
    finally:
        end(server)
        server.communicate()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_api_answers_on_loopback_until_it_is_stopped(database_url: str, how: signal.Signals) -> None:
    """Its exit status is 128 + the number of the signal."""
    insert_portfolio_history_snapshot(_snapshot(0))
    with _serving() as (server, address):
        assert address.startswith("http://127.0.0.1:")
        answer = httpx.get(f"{address}/trading/portfolio-history?limit=1")
        assert (answer.status_code, len(answer.json())) == (200, 1)
        assert "server" not in answer.headers
        assert httpx.get(f"{address}/readyz").status_code == 200
        server.send_signal(how)
        assert server.wait(15) == 128 + how


def test_api_without_a_token_answers_only_to_names_of_loopback(database_url: str) -> None:
    """A web page whose host name resolves to 127.0.0.1 must not read the API. With a token, any name is accepted."""
    with _serving() as (_, address):
        port = address.rpartition(":")[2]
        statuses = {
            host: httpx.get(f"{address}/trading/signal-archives", headers={"Host": host}).status_code
            for host in (
                f"localhost:{port}",
                f"[::1]:{port}",
                "127.0.0.1",
                f"evil.example:{port}",
                "localhost.evil.example",
            )
        }
    assert list(statuses.values()) == [200, 200, 200, 421, 421]
    with _serving(HISTORY_API_TOKEN="s3cret") as (_, address):
        headers = {"Host": "history.example", "Authorization": "Bearer s3cret"}
        assert httpx.get(f"{address}/trading/signal-archives", headers=headers).status_code == 200


def test_api_warns_about_an_open_address_without_a_token(database_url: str) -> None:
    with _serving("--host", "0.0.0.0") as (server, _):
        server.terminate()
        assert "HISTORY_API_TOKEN is not set" in server.communicate(timeout=15)[1]


def test_api_reports_a_port_that_is_taken_in_one_line(database_url: str) -> None:
    with _serving() as (_, address):
        again = subprocess.run(
            [*PROGRAM, "api", "--port", address.rpartition(":")[2]],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (1, "", 1)
    assert again.stderr.startswith("error: cannot listen at 127.0.0.1 port")


def test_status_watch_repeats_until_ctrl_c(redis: Redis, database_url: str) -> None:
    """In a pipe, it prints one block of lines, or one line of JSON, after another."""
    pipe = subprocess.PIPE
    watching, as_json = (
        subprocess.Popen([*PROGRAM, "status", "--watch", *more], stdout=pipe, stderr=pipe, text=True)
        for more in ((), ("--json",))
    )
    assert watching.stdout is not None
    assert as_json.stdout is not None
    first = json.loads(as_json.stdout.readline())
    insert_portfolio_history_snapshot(_snapshot(0))
    later = [json.loads(as_json.stdout.readline()) for _ in range(2)][-1]
    shown = [line.split() for line in islice((line for line in watching.stdout if line.startswith("database")), 2)]
    ended = []
    for process in (watching, as_json):
        process.send_signal(signal.SIGINT)
        ended.append((process.communicate(timeout=15)[1], process.returncode))

    assert (first["portfolio_snapshots"], later["portfolio_snapshots"]) == (0, 1)
    assert shown == 2 * [["database", "reachable"]]
    assert ended == 2 * [("", 130)]


def test_status_watch_redraws_in_place_on_a_terminal(redis: Redis, database_url: str) -> None:
    """After Ctrl-C, the last status stays on the screen."""
    with _terminal(80, "status", "--watch") as (watching, screen):
        seen = b""
        while seen.count(b"signal archives") < 2:
            seen += os.read(screen, 4096)
        watching.send_signal(signal.SIGINT)
        while watching.poll() is None:
            try:
                seen += os.read(screen, 4096)
            except OSError:  # the other end is closed
                watching.wait(15)
    assert watching.returncode == 130
    assert b"\x1b[1A" in seen
    assert b"Traceback" not in seen


@pytest.mark.parametrize("columns", [40, 50, 80, 110, 200])
@pytest.mark.parametrize("command", ["history", "archives"])
def test_tables_fit_the_window_without_cutting_numbers(database_url: str, columns: int, command: str) -> None:
    """Columns that do not fit are left out, and a line below the table names them."""
    for number in range(3):
        insert_portfolio_history_snapshot(_snapshot(number))
        insert_signal_archive(
            {"archived_at": INSTANT + timedelta(hours=number), "signals": [a_signal(reason="x" * 500)]}
        )
    with _terminal(columns, command) as (shown, screen):
        seen = b""
        while True:
            try:
                seen += os.read(screen, 4096)
            except OSError:  # the other end is closed
                break
        assert shown.wait(30) == 0
    lines = _plain(seen).splitlines()

    assert max(len(line) for line in lines) <= columns
    if command == "history":
        assert sum("123,456,789,012.13" in line for line in lines) == 3
        assert "…" not in "".join(lines)
    assert ("without:" in " ".join(lines)) == (columns < (130 if command == "history" else 66))


def _snapshot(number: int) -> dict[str, object]:
    amounts = dict.fromkeys(("balance", "total_invested", "total_profit_loss", "total_value"), 123456789012.13)
    counts = {"open_positions": 1, "trade_count": 4}
    return {"timestamp": INSTANT + timedelta(hours=number), **amounts, **counts}


@contextmanager
def _terminal(columns: int, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a command in a terminal of `columns` columns. Yields the process and the terminal's other end."""
    screen, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = subprocess.Popen([*PROGRAM, *arguments], stdout=end, stderr=end, env={**environment, "TERM": "xterm"})
    os.close(end)
    try:
        yield command, screen
    finally:
        command.kill()
        command.wait()
        os.close(screen)


def _plain(output: bytes) -> str:
    from rich.text import Text

    return Text.from_ansi(output.decode().replace("\r\n", "\n")).plain
