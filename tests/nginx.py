"""Debian's nginx in front of the web servers: each is served under a path, which nginx removes or keeps."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest

from consumers.web.api import create_app
from tests.dashboard_server import dashboard_of
from tests.documents import block
from tests.page_app import serving
from tests.ports import free_port, wait_until_it_listens

Kind = Literal["removes", "keeps"]
_API, _DASHBOARD = "http://127.0.0.1:8000", "http://127.0.0.1:9181"
_CONFIGURATION = """\
daemon off;
master_process off;
pid {folder}/pid;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
{locations}
  }}
}}
"""


def _documented(kind: Kind) -> str:
    """Return the configuration of the documents for a proxy that removes or keeps the paths."""
    if kind == "removes":
        return block("consumers/web/README.md", "nginx removes the path")
    return block("consumers/web/README.md", "nginx keeps the path")


@contextmanager
def web_servers(kind: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch, *, more: str = "") -> Iterator[str]:
    """Serve the API at `history/` and RQ Dashboard at `rq/` below the URL that this yields, as the documents say.

    They use the Redis and the database of the settings. `more` is added to nginx's configuration.
    """
    port = free_port()
    monkeypatch.setenv("HISTORY_DASHBOARD_URL", f"http://127.0.0.1:{port}/rq/")
    if kind == "keeps":
        monkeypatch.setenv("HISTORY_API_ROOT_PATH", "/history")
    with serving(create_app()) as api, dashboard_of(os.environ["REDIS_URL"], folder / "dashboard.log") as dashboard:
        locations = _documented(kind) + more
        for documented, url in ((_API, api.url), (_DASHBOARD, dashboard.url)):
            assert documented in locations
            locations = locations.replace(documented, f"http://{urlsplit(url).netloc}")
        with _nginx(folder / "nginx", port, locations):
            yield f"http://127.0.0.1:{port}/"


@contextmanager
def _nginx(folder: Path, port: int, locations: str) -> Iterator[None]:
    folder.mkdir()
    configuration, log = folder / "nginx.conf", folder / "log"
    configuration.write_text(_CONFIGURATION.format(folder=folder, port=port, locations=locations))
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [program, "-e", "stderr", "-p", str(folder), "-c", str(configuration)], stderr=errors
        )
    try:
        wait_until_it_listens(process, port, log)
        yield
    finally:
        process.kill()
        process.wait()
