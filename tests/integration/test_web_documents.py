"""The documents of consumers/web: their commands and examples run, and their tables match the code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from consumers.web.api import app
from consumers.web.api.parameters import HistoryParameters, SignalsParameters
from tests.documents import block, table
from tests.factories import a_signal
from tests.histories import store_archive, store_values

_PROGRAMS = str(Path(sys.executable).parent)
_EXAMPLE_URL = "http://127.0.0.1:8000/"


@contextmanager
def _running(script: str, log: Path, **environment: str) -> Iterator[str]:
    """Run a block that ends with a server's command, at a free port; yields the address that it prints."""
    *before, command = script.strip().splitlines()
    script = "\n".join([*before, f"exec {command} --port 0"])
    variables = {**os.environ, "PATH": f"{_PROGRAMS}:{os.environ['PATH']}", **environment}
    with log.open("w") as errors:
        process = subprocess.Popen(
            ["sh", "-ec", script], stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
        )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().partition(" - ")[0]
    finally:
        process.kill()
        process.communicate()


def _run(script: str, url: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    assert _EXAMPLE_URL in script
    script = script.replace(_EXAMPLE_URL, url).replace("curl ", "curl -sSf ")
    return subprocess.run(
        ["sh", "-ec", script],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def _some_history(database_url: str) -> None:
    store_values([100, 110, 105], step=timedelta(hours=1))
    store_values([None, 120])
    store_archive([a_signal(market_id="510372")], at=datetime(2026, 6, 2, tzinfo=UTC))


@pytest.mark.usefixtures("_some_history")
def test_the_server_and_the_curl_examples_run(redis: Redis, tmp_path: Path) -> None:
    """The examples list daily closes and a market's signals, write archives as CSV, and all snapshots as NDJSON."""
    with _running(block("consumers/web/README.md", "serve"), tmp_path / "log") as url:
        ran = _run(block("consumers/web/README.md", "curl"), url, tmp_path)
        (tmp_path / "history.ndjson").rename(tmp_path / "first.ndjson")
        streamed = _run(block("consumers/db/ANALYSIS.md", "from the API"), url, tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    snapshots, end = json.JSONDecoder().raw_decode(ran.stdout)
    signals = json.loads(ran.stdout[end:])
    assert [row["total_value"] for row in snapshots] == [120, 105]
    assert [row["signal"]["market_id"] for row in signals] == ["510372"]
    assert len((tmp_path / "archives.csv").read_text("utf-8").splitlines()) == 2
    assert (streamed.returncode, streamed.stderr) == (0, "")
    for file in ("first.ndjson", "history.ndjson"):
        assert len((tmp_path / file).read_text("utf-8").splitlines()) == 4


@pytest.mark.usefixtures("_some_history")
def test_the_token_example_is_required_and_accepted(tmp_path: Path) -> None:
    """Without the token, curl reports 401."""
    example = block("consumers/web/README.md", "token")
    serve = block("consumers/web/README.md", "serve")
    with _running(serve, tmp_path / "log", HISTORY_API_TOKEN="right") as url:
        accepted = _run(example, url, tmp_path, HISTORY_API_TOKEN="right")
        rejected = _run(example, url, tmp_path, HISTORY_API_TOKEN="wrong")
    assert [row["total_value"] for row in json.loads(accepted.stdout)] == [120]
    assert "401" in rejected.stderr


def test_the_table_of_paths_matches_the_app() -> None:
    """Apart from the page and its data, which are not an interface."""
    documented = {cells[0].strip("`") for cells in table("consumers/web/README.md", "endpoints")}
    assert documented == {*app.openapi()["paths"], "/metrics", "/openapi.json"}


def test_the_table_of_parameters_matches_the_app() -> None:
    """Each parameter is documented, and each documented parameter exists."""
    documented = {
        name.strip("`") for cells in table("consumers/web/README.md", "parameters") for name in cells[0].split(", ")
    }
    assert documented == {*HistoryParameters.model_fields, *SignalsParameters.model_fields}


@pytest.mark.usefixtures("_some_history")
def test_the_example_of_an_app_with_the_router_answers() -> None:
    """With its own prefix and with the limit of waits for PostgreSQL."""
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(block("consumers/web/README.md", "router"), namespace)
    assert "answer_seconds=6," in block("consumers/web/README.md", "router")  # more than a statement may take
    with TestClient(namespace["app"]) as client:
        assert len(client.get("/bot/trading/portfolio-history").json()) == 4


def test_the_dashboard_starts_as_documented(redis: Redis, tmp_path: Path) -> None:
    """With the password of the example."""
    with _running(block("consumers/web/dashboard/README.md", "start"), tmp_path / "log") as url:
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, auth=("history", "choose-your-own"), follow_redirects=True).status_code == 200
