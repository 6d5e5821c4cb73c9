"""Response times of the API with few and with many rows, and the request rate of two processes."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from tests.benchmarks.checks import require, rows
from tests.benchmarks.environment import bench_stack
from tests.benchmarks.filling import fill_archives, fill_snapshots
from tests.benchmarks.printing import print_columns, print_header, print_row, quantiles
from tests.benchmarks.report import Report

_FEW = 10_000
_CALLS = 1000
_CLIENTS = 4
_LOAD_SECONDS = 5.0
_START_SECONDS = 30.0
_MOST_RATIO = 2.0  # response time with many rows / with few rows
_MAIN_REQUESTS = {
    "portfolio-history": "/trading/portfolio-history?limit=100",
    "signal-archives": "/trading/signal-archives?limit=100",
}
# The cost of each filter and index.
_OTHER_REQUESTS = {
    "... of one portfolio": "/trading/portfolio-history?limit=100&portfolio_id=2",
    "... until, long ago": "/trading/portfolio-history?limit=100&until=2020-01-01T12:00:00Z",
    "... daily=last": "/trading/portfolio-history?limit=100&daily=last",
    "signals of a market": "/trading/signals?limit=100&market_id=77",
}


def measure_api(count: int, report: Report) -> None:
    """Print p50 and p99 with _FEW and with `count` rows in each table, and the requests per second of two processes."""
    seconds: dict[tuple[int, str], tuple[float, float, float]] = {}
    with bench_stack():
        filled = 0
        for size in (_FEW, count):
            fill_snapshots(filled, size - 1)
            fill_archives(filled, size - 1)
            filled = size
            require(rows() == rows("signal_archives") == size, f"a table does not have {size} rows")
            with _serving(1) as port:
                print_header(f"milliseconds, {size:,} rows in each table")
                for label, url in {**_MAIN_REQUESTS, **_OTHER_REQUESTS}.items():
                    times = _ask(port, url, _CALLS)
                    seconds[size, label] = quantiles(times)
                    report.add_quantiles("api", f"{label}, {size:,} rows", times)
        _print_rates(report)
    _print_ratios(seconds, count, report)


def _print_ratios(seconds: dict[tuple[int, str], tuple[float, float, float]], count: int, report: Report) -> None:
    print_columns(f"{count:,} rows to {_FEW:,} rows", ("p50", "p99"))
    for label in _MAIN_REQUESTS:
        ratios = [many / few for many, few in zip(seconds[count, label], seconds[_FEW, label], strict=True)][:2]
        for name, ratio in zip(("p50", "p99"), ratios, strict=True):
            report.add("api", f"{label}, ratio of {name}", "", [ratio])
        print_row(label, ("p50", "p99"), [f"{ratio:.2f}" for ratio in ratios])
        if max(ratios) > _MOST_RATIO:
            report.note(f"{label}: more than {_MOST_RATIO:.0f} times slower with {count:,} rows")


def _print_rates(report: Report) -> None:
    print_columns(f"two processes, {_CLIENTS} clients, {_LOAD_SECONDS:.0f} s", ("requests/s",))
    with _serving(2) as port, ProcessPoolExecutor(_CLIENTS) as pool:
        for label, url in _MAIN_REQUESTS.items():
            rate = sum(pool.map(_load, [port] * _CLIENTS, [url] * _CLIENTS)) / _LOAD_SECONDS
            report.add("api", f"{label}, two processes", "requests/s", [rate])
            print_row(label, ("requests/s",), [f"{rate:,.0f}"])


@contextmanager
def _serving(processes: int) -> Iterator[int]:
    """Run uvicorn with `consumers.web.api:app`; yield its port once it answers."""
    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "consumers.web.api:app",
        "--port",
        str(port),
        "--workers",
        str(processes),
    ]
    server = subprocess.Popen([*command, "--log-level", "warning", "--no-access-log"])
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(port):
            require(time.monotonic() < deadline and server.poll() is None, "the API did not start")
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait(30)


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as unused:
        return int(unused.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        return bool(_ask(port, "/readyz", 1))
    except OSError:
        return False


def _ask(port: int, url: str, calls: int) -> list[float]:
    """Return the seconds of each of `calls` sequential requests on one connection, after a warm-up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    times = [_timed(connection, url) for _ in range(calls + calls // 10)]
    connection.close()
    return times[-calls:]


def _timed(connection: http.client.HTTPConnection, url: str) -> float:
    started = time.perf_counter()
    connection.request("GET", url)
    answer = connection.getresponse()
    answer.read()
    seconds = time.perf_counter() - started
    require(answer.status == 200, f"{url} returned status {answer.status}")
    return seconds


def _load(port: int, url: str) -> int:
    """Return the number of requests that one client completes in _LOAD_SECONDS."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    calls, until = 0, time.monotonic() + _LOAD_SECONDS
    while time.monotonic() < until:
        _timed(connection, url)
        calls += 1
    connection.close()
    return calls
