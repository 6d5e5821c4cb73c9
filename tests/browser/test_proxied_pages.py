"""The history page and RQ Dashboard in a browser, under paths of nginx, which removes the path or keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Response, expect
from redis import Redis

from tests.browser.conftest import DESK
from tests.dashboard_server import FAILED_KEY, PASSWORD, failure, plant
from tests.factories import a_signal
from tests.histories import store_archive, store_values
from tests.nginx import Kind, web_servers

_POLLED = 10_000  # milliseconds; the pages reload their data every 2.5 s
_BOTH = pytest.mark.parametrize("kind", ["removes", "keeps"])


class Visitor:
    """Browser page whose requests and complaints are collected."""

    def __init__(self, context: BrowserContext) -> None:
        self.page = context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(urlsplit(request.url).path))
        self.page.on("response", self._check)
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _check(self, response: Response) -> None:
        if response.status >= 400:
            self.complaints.append(f"{response.status} {response.url}")

    def _listen(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


@pytest.fixture
def visitor(chromium: Browser) -> Iterator[Visitor]:
    """Logged in to RQ Dashboard. At the end, each answer must be a success and the console without errors."""
    login = {"username": "history", "password": PASSWORD}
    options: Any = {"viewport": DESK, "http_credentials": login, "locale": "en-GB"}
    with chromium.new_context(**options) as context:
        context.set_default_timeout(30_000)
        visitor = Visitor(context)
        yield visitor
        assert context.cookies() == []
    assert visitor.complaints == []


def _outside(visitor: Visitor, *paths: str) -> list[str]:
    return [path for path in visitor.requests if not path.startswith(paths)]


@_BOTH
@pytest.mark.usefixtures("database_url")
def test_the_history_page_works_under_a_path_and_leads_to_the_dashboard(
    visitor: Visitor, kind: Kind, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, its data, zoom, search and archives, and the link. Every request is under one of the two paths."""
    store_values([10_000, 10_100, 9_800, 10_400])
    store_archive([a_signal(market_question="Will it rain?"), a_signal(market_question="Will it snow?")])
    plant(redis, "j", {"data": b'["f", null, ["x"], {}]', "status": b"failed", "origin": b"history"})
    with web_servers(kind, tmp_path, monkeypatch) as url:
        page = visitor.page
        page.goto(f"{url}history")  # without the last slash
        expect(page.locator("#live")).to_have_text("Live")
        assert page.url == f"{url}history/"
        expect(page.locator("#summary")).to_contain_text("10,400.00")
        page.get_by_role("button", name="one day").click()
        expect(page.locator("#drawn")).to_contain_text("in this range")
        page.locator("#wanted").fill("snow")
        page.keyboard.press("Enter")
        expect(page.locator("#listing tbody > tr:not(.fields)")).to_have_text([re.compile("Will it snow?")])
        page.locator("#months button").first.click()
        page.locator("#wanted").fill("")
        page.keyboard.press("Enter")
        page.locator("#listing button[id^=archive-]").click()
        expect(page.locator("#listing tbody > tr:not(.fields)")).to_have_count(2)
        assert page.evaluate("document.querySelector('#value-chart canvas').width") > 0
        assert _outside(visitor, "/history") == []
        wanted = {"newest", "curve", "daily", "months", "archives", "signals", "health", "static"}
        assert wanted <= {path.split("/")[3] for path in visitor.requests if path.startswith("/history/page/")}

        page.get_by_role("link", name="RQ Dashboard").click()
        expect(page.locator("#queues tbody")).to_contain_text("history")
        assert page.url == f"{url}rq/"
        assert _outside(visitor, "/history", "/rq/") == []


@_BOTH
def test_the_dashboard_works_under_a_path(
    visitor: Visitor, kind: Kind, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Navigation, lists and their pages, a job and its buttons, all buttons of a list. Every request is under /rq/."""
    for number in range(10):
        fields = {"data": b'["f", null, ["x"], {}]', "status": b"failed", "origin": b"history"}
        plant(redis, f"job-{number}", fields, result=failure("InvalidEvent: no"))
    with web_servers(kind, tmp_path, monkeypatch) as url:
        page = visitor.page
        page.goto(f"{url}rq")  # without the last slash
        expect(page.locator("#queues tbody")).to_contain_text("history")
        for name, address in (("Workers", "0/view/workers"), ("Jobs", "0/view/jobs"), ("Queues", "")):
            page.get_by_role("link", name=name, exact=True).click()
            page.wait_for_url(f"{url}rq/{address}")  # Flask redirects from 0/view/queues
            expect(page.locator("tbody").first).not_to_contain_text("Loading")
        page.locator("#queues tbody td.failed a").first.click()
        expect(page.locator("tr[data-role=job]")).to_have_count(8)
        page.locator("#page-selection").get_by_role("link", name="2", exact=True).click()
        expect(page.locator("tr[data-role=job]")).to_have_count(2)
        page.get_by_role("link", name="job-9").click()
        page.get_by_role("button", name="Requeue").click()
        expect(page.locator("#job-data")).to_contain_text(re.compile("Status:\\s*queued"), timeout=_POLLED)
        _press(page, "Delete")
        page.wait_for_url(f"{url}rq/")
        page.locator("#queues tbody td.failed a").first.click()
        expect(page.locator("tr[data-role=job]")).to_have_count(8)
        page.locator("#select-sort-order").select_option("dsc")
        page.wait_for_url(re.compile("/rq/0/view/jobs/history/failed/8/dsc/1$"))
        for name in ("Requeue All", "Empty queue"):
            if name == "Empty queue":
                page.goto(f"{url}rq/0/view/jobs/history/queued/8/asc/1")
            _press(page, name)
            expect(page.locator("#jobs tbody")).to_contain_text("No jobs.", timeout=_POLLED)
    assert (redis.zcard(FAILED_KEY), redis.keys("rq:job:*")) == (0, [])
    assert _outside(visitor, "/rq/") == ["/rq"]


def _press(page: Page, name: str) -> None:
    page.locator(".btn", has_text=name).first.click()
    page.get_by_role("button", name="Yes").click()


@pytest.mark.usefixtures("database_url", "redis")
def test_the_token_of_one_path_is_not_sent_to_another(
    chromium: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bots' pages behind one host name have the same storage in the browser. Each page keeps its own token."""
    store_values([1, 2])
    monkeypatch.setenv("HISTORY_API_TOKEN", "open-sesame")
    other = "location /other/ { proxy_pass http://127.0.0.1:8000/; }"
    with (
        web_servers("removes", tmp_path, monkeypatch, more=other) as url,
        chromium.new_context() as one,
    ):
        page = one.new_page()
        sent: list[tuple[str, str | None]] = []
        page.on("request", lambda request: sent.append((request.url, request.headers.get("authorization"))))
        page.goto(f"{url}history/")
        page.get_by_label("Token of this server").fill("open-sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#live")).to_have_text("Live")
        page.goto(f"{url}other/")
        expect(page.locator("#token-form")).to_be_visible()
        page.goto(f"{url}history/")
        expect(page.locator("#live")).to_have_text("Live")
    assert {token for address, token in sent if "/other/page/" in address} == {None}
