"""A headless Chromium that opens the real page, with real servers behind it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright
from sqlalchemy import make_url

from consumers.db import engine as db_engine
from consumers.web.api import create_app
from tests.faults.proxy import Proxy
from tests.page_app import PageServer, serving

DESK = {"width": 1280, "height": 900}
# These come from an outage made by a test and from a canvas that a test reads, not from a defect of the page.
_OF_TESTS = ("Failed to load resource", "Canvas2D: Multiple readback")

OpenPage = Callable[..., Page]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server(database_url: str) -> Iterator[PageServer]:
    with serving(create_app()) as server:
        yield server


@pytest.fixture
def open_page(chromium: Browser, server: PageServer) -> Iterator[OpenPage]:
    """Function that opens the page. At the end, the browser's console must have no error and no warning."""
    complaints: list[str] = []
    contexts = []

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(_OF_TESTS):
            complaints.append(message.text)

    def open_page(**options: Any) -> Page:
        wanted = {"viewport": DESK, "locale": "en-GB", "timezone_id": "Europe/Berlin"} | options
        context = chromium.new_context(**wanted)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


class Outage:
    """Outage of the connection between the page's server and PostgreSQL."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def begin(self) -> None:
        self._proxy.set_mode("refuse")
        self._proxy.cut()

    def end(self) -> None:
        self._proxy.set_mode("pass")


@pytest.fixture
def outage(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outage]:
    """Connection to the database that a test can cut. Request it before `server`."""
    url = make_url(database_url)
    name = ".s.PGSQL.5432"
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        proxy = Proxy(Path(folder, name), Path(str(url.query["host"]), name))
        with proxy.running():
            through = url.update_query_dict({"host": folder}).render_as_string(hide_password=False)
            monkeypatch.setenv("DATABASE_URL", through)
            db_engine.engine.cache_clear()
            yield Outage(proxy)
            with suppress(OSError):
                db_engine.engine().dispose()
            db_engine.engine.cache_clear()
            monkeypatch.setenv("DATABASE_URL", database_url)
