"""Debian's Prometheus: promtool, and a server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from tests.ports import free_port, wait_until_it_listens
from tests.rq_programs import until


def program(name: str) -> str:
    """Return the path of `prometheus` or `promtool`. Fails the test if the package is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"no {name}: apt-get install prometheus")
    return found


def promtool(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run promtool in `folder` to its end."""
    command = [program("promtool"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


class Prometheus:
    """HTTP API of a server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer."""
        with urlopen(f"{self._url}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query."""
        samples: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return samples


def _is_ready(address: str) -> bool:
    """Return whether the server has loaded its data: until then it answers 503."""
    try:
        with urlopen(f"http://{address}/-/ready", timeout=10):
            return True
    except HTTPError:
        return False


@contextmanager
def prometheus(configuration: dict[str, Any], folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with this configuration during the block, on loopback and with its data in `folder`.

    Without `global`, it scrapes and evaluates every second.
    """
    folder.mkdir()
    every_second = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}}
    file, log, port = folder / "prometheus.yml", folder / "log", free_port()
    file.write_text(yaml.safe_dump(every_second | configuration), "utf-8")
    address = f"127.0.0.1:{port}"
    command = [program("prometheus"), f"--config.file={file}", f"--web.listen-address={address}"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, f"--storage.tsdb.path={folder / 'data'}"], stdout=output, stderr=output, cwd=folder
        )
    try:
        wait_until_it_listens(server, port, log)
        until(lambda: _is_ready(address))
        yield Prometheus(f"http://{address}")
    finally:
        server.terminate()
        server.wait(20)
