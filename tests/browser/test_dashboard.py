"""RQ Dashboard in a browser: its lists, reasons of failures, requeue and delete, and protection against other sites."""

from __future__ import annotations

import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Dialog, Page, expect
from redis import Redis
from rq import Queue
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from sqlalchemy import text

from consumers.db.engine import engine, get_db
from consumers.embedded import Addresses
from producers.events import encode, event_of
from tests.browser.conftest import DESK
from tests.dashboard_server import FAILED_KEY, PASSWORD, SNAPSHOT_FUNCTION, Dashboard, dashboard_of, failure, plant
from tests.deliveries import burst, enqueue_snapshots
from tests.factories import a_snapshot

OpenDashboard = Callable[[str], Page]
_POLLED = 10_000  # milliseconds; the pages reload their data every 2.5 s


@pytest.fixture(scope="module")
def dashboard(pair: Addresses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    with dashboard_of(pair.redis_url, tmp_path_factory.mktemp("dashboard") / "log") as dashboard:
        yield dashboard


@pytest.fixture
def open_dashboard(chromium: Browser, dashboard: Dashboard, redis: Redis) -> Iterator[OpenDashboard]:
    """Function that opens one of its addresses, logged in. At the end, the console must have no error or warning."""
    complaints: list[str] = []
    login = {"username": "history", "password": PASSWORD}
    context = chromium.new_context(viewport=DESK, http_credentials=login, locale="en-GB")  # type: ignore[arg-type]  # a dict is accepted
    context.set_default_timeout(30_000)

    def listen(message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    def dismiss(dialog: Dialog) -> None:
        complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open_dashboard(address: str) -> Page:
        page = context.new_page()
        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", dismiss)
        page.goto(dashboard.url + address)
        return page

    yield open_dashboard
    context.close()
    assert complaints == []


def _reject_one(redis: Redis) -> str:
    """Store a snapshot, reject one with the same id and other amounts, and return the job id of the latter."""
    queue = Queue("history", connection=redis, serializer=JSONSerializer)
    jobs = [
        queue.enqueue(
            SNAPSHOT_FUNCTION,
            encode(event_of(a_snapshot(balance=balance), source="other/1", sequence=sequence)),
            failure_ttl=-1,
        )
        for sequence, balance in enumerate(("9900.12", "17.00000001"))
    ]
    burst(redis)
    return str(jobs[1].id)


def test_a_browser_without_the_login_gets_401(chromium: Browser, dashboard: Dashboard) -> None:
    """With one line of text."""
    with chromium.new_context() as context:
        answer = context.request.get(dashboard.url + "0/view/queues")
        assert (answer.status, answer.text()) == (401, "The user or the password is missing or wrong.\n")


def test_a_rejected_event_can_be_found_and_requeued_and_is_then_stored(
    open_dashboard: OpenDashboard, redis: Redis, database_url: str
) -> None:
    """From the red number to the reason and the button; then Failed and event_outcomes are empty."""
    job_id = _reject_one(redis)
    page = open_dashboard("")
    page.locator("#queues tbody td.failed a").first.click()
    row = page.locator("tr[data-role=job]")
    expect(row.locator(".exc_info")).to_have_text(re.compile("EventConflict: "))
    row.get_by_role("link", name=job_id).click()
    shown = page.locator("#job-data")
    expect(shown.locator(".exc_info")).to_have_text(re.compile("EventConflict: "))
    expect(shown).to_contain_text(re.compile("Status:\\s*failed"))

    with get_db() as db:
        db.execute(text("DELETE FROM portfolio_history"))
    page.get_by_role("button", name="Requeue").click()
    expect(shown).to_contain_text(re.compile("Status:\\s*queued"), timeout=_POLLED)
    burst(redis)
    expect(shown).to_contain_text(re.compile(r"Status:\s*finished\s*Result:\s*\d+\s"), timeout=_POLLED)
    with get_db() as db:
        stored, open_outcomes = db.execute(
            text("SELECT (SELECT max(balance) FROM portfolio_history), (SELECT count(*) FROM event_outcomes)")
        ).one()
    assert (str(stored), open_outcomes, redis.zcard(FAILED_KEY)) == ("17.00000001", 0, 0)


def test_the_buttons_of_a_list_delete_requeue_and_empty(open_dashboard: OpenDashboard, redis: Redis) -> None:
    """Each asks before it acts."""
    fields = {"data": b'["f", null, ["x"], {}]', "status": b"failed", "origin": b"history"}
    for name in ("first", "second"):
        plant(redis, name, fields, result=failure("InvalidEvent: no"))
    page = open_dashboard("0/view/jobs/history/failed/8/asc/1")

    def press(name: str) -> None:
        page.get_by_role("link", name=name).first.click()
        page.get_by_role("button", name="Yes").click()

    press("Delete")
    expect(page.locator("tr[data-role=job]")).to_have_count(1)
    press("Requeue All")
    expect(page.locator("#jobs tbody")).to_contain_text("No jobs.", timeout=_POLLED)
    assert (redis.zcard(FAILED_KEY), redis.lrange("rq:queue:history", 0, -1)) == (0, [b"second"])
    page.goto(page.url.replace("failed", "queued"))
    press("Empty queue")
    expect(page.locator("#jobs tbody")).to_contain_text("No jobs.")
    assert redis.keys("rq:job:*") == []


def test_a_read_only_dashboard_says_so_and_shows_no_buttons(
    chromium: Browser, pair: Addresses, redis: Redis, tmp_path: Path
) -> None:
    """The same pages with buttons are seen without the setting."""
    fields = {"data": b'["f", null, ["x"], {}]', "status": b"failed", "origin": b"history"}
    plant(redis, "first", fields, result=failure("InvalidEvent: no"))
    plant(redis, "second", fields, failed=False)
    shown = {
        "0/view/jobs/history/failed/8/asc/1": "tr[data-role=job]",
        "0/view/jobs/history/queued/8/asc/1": "tr[data-role=job]",
        "0/view/job/first": "#job-data .exc_info",
    }
    login: Any = {"username": "history", "password": PASSWORD}

    def buttons(**settings: str) -> dict[str, list[str]]:
        """Return the names of the visible buttons of each page."""
        with (
            dashboard_of(pair.redis_url, tmp_path / "log", **settings) as dashboard,
            chromium.new_context(viewport=DESK, http_credentials=login) as context,  # type: ignore[arg-type]  # a dict is accepted
        ):
            found = {}
            page = context.new_page()
            for address, place in shown.items():
                page.goto(dashboard.url + address)
                expect(page.locator(place).first).to_be_visible(timeout=30_000)
                found[address] = [one.inner_text() for one in page.locator(".section .btn:visible").all()]
            brand = page.locator(".navbar-brand").evaluate("one => getComputedStyle(one, '::after').content")
            found["bar"] = [brand]
            return found

    assert list(buttons(HISTORY_DASHBOARD_READONLY="1").values()) == [[], [], [], ['" (read-only)"']]
    assert list(buttons().values()) == [
        ["Empty queue", "Requeue All", "Requeue", "Delete"],
        ["Empty queue", "Compact", "Delete"],
        ["Requeue", "Delete"],
        ["none"],
    ]


def test_every_page_loads_while_a_worker_is_busy(
    open_dashboard: OpenDashboard, redis: Redis, database_url: str, tmp_path: Path
) -> None:
    """Its batch waits for a lock of another session."""
    with engine().begin() as blocker, (tmp_path / "log").open("w") as log:
        blocker.execute(text("LOCK TABLE portfolio_history"))
        enqueue_snapshots(redis, 3)
        worker = subprocess.Popen(
            [sys.executable, "-m", "consumers.cli", "worker"], stderr=log, stdin=subprocess.DEVNULL
        )
        try:
            page = open_dashboard("0/view/workers")
            expect(page.locator("#workers tr[data-role=worker]")).to_contain_text("history", timeout=30_000)
            for address in ("", "0/view/jobs"):
                expect(open_dashboard(address).locator("tbody")).not_to_contain_text("Loading")
        finally:
            blocker.rollback()
            worker.terminate()
            assert worker.wait(20) == 0


_HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def test_text_from_redis_never_runs_in_the_browser(open_dashboard: OpenDashboard, redis: Redis) -> None:
    """Names, descriptions, calls, results and reasons; the same for text of an address."""
    hostile = _HOSTILE.encode()
    fields = {
        "data": f'["f{_HOSTILE}", null, ["{_HOSTILE}"], {{}}]'.encode(), "description": hostile, "origin": b"history",
        "status": b"failed", "meta": b'{"a": "%s"}' % hostile, "dependency_ids": b'["%s"]' % hostile,
    }  # fmt: skip
    returned = {"return_value": b64encode(b'"%s"' % hostile)}
    plant(redis, "j", fields, result=failure(f"{_HOSTILE}\n{_HOSTILE}"))
    plant(redis, "other", fields | {"origin": hostile}, result={"type": b"1"} | returned)
    redis.sadd("rq:queues", f"rq:queue:{_HOSTILE}", "rq:queue:'-alert(3)-'", "rq:queue:</script>" + _HOSTILE)
    redis.sadd("rq:workers", f"rq:worker:{_HOSTILE}")
    odd: Any = {"state": _HOSTILE, "queues": _HOSTILE, "version": _HOSTILE, "python_version": _HOSTILE}
    redis.hset(f"rq:worker:{_HOSTILE}", mapping=odd)
    with redis.pipeline() as pipe:
        job = Job.fetch("j", connection=redis, serializer=JSONSerializer)
        Execution.create(job, 60, pipe, worker_name=_HOSTILE)
        pipe.execute()

    shown = {
        "": "#queues tbody", "0/view/workers": "#workers tbody", "0/view/job/j": "#job-data",
        "0/view/job/other": "#job-data", "0/view/jobs/history/failed/8/asc/1": "#jobs tbody",
    }  # fmt: skip
    for address, place in shown.items():
        page = open_dashboard(address)
        expect(page.locator(place)).to_contain_text("onerror")
        expect(page.locator(place)).not_to_contain_text("&lt;")
        assert page.locator("img").count() == 0
    for name in ("'-alert(3)-'", "%3Cimg%20src=x%20onerror=alert(4)%3E"):
        page = open_dashboard(f"0/view/jobs/{name}/queued/8/asc/1")
        expect(page.locator("#jobs tbody")).to_contain_text("No jobs.")
        page.locator("#select-queue").click()
        page.locator("h2, .intro").first.hover()


def test_another_site_cannot_change_anything_with_the_operators_login(
    open_dashboard: OpenDashboard, dashboard: Dashboard, redis: Redis
) -> None:
    """The browser adds the login to a form that a page of another origin submits."""
    plant(redis, "j", {"data": b'["f", null, ["x"], {}]', "status": b"failed", "origin": b"history"})
    page = open_dashboard("")
    expect(page.locator("#queues tbody")).to_contain_text("history")
    other = page.context.new_page()
    for method, status in (("post", 403), ("get", 405)):
        other.goto("about:blank")
        other.set_content(
            f'<form method="{method}" action="{dashboard.url}requeue/history"><button>Win</button></form>'
        )
        with other.expect_response("**/requeue/history*") as answer:
            other.get_by_role("button").click()
        assert answer.value.status == status
    assert (redis.zcard(FAILED_KEY), redis.llen("rq:queue:history")) == (1, 0)
