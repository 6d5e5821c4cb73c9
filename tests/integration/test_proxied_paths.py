"""The API and RQ Dashboard under paths of nginx, which removes the path from a request or keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from redis import Redis

from consumers.settings import ApiSettings
from consumers.web.api import app, router
from producers.errors import SettingsError
from tests.dashboard_server import PASSWORD, failure, pages, plant
from tests.factories import a_signal
from tests.histories import START, store_archive, store_values
from tests.nginx import web_servers

_LISTINGS = ("trading/portfolio-history", "trading/signal-archives", "trading/signals?market_id=510372")
_ADDRESSES = re.compile('(?:href|src|action)="(/[^"]*)|"[a-z_]+_url": ?"([^"]+)|var url = "([^"]+)')
_FORGED = {"X-Forwarded-Prefix": "/evil", "X-Script-Name": "/evil", "X-Forwarded-Path": "/evil"}


@pytest.fixture(params=["removes", "keeps"])
def site(
    request: pytest.FixtureRequest,
    database_url: str,
    redis: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """URL of nginx with some history: the API is at `history/`, RQ Dashboard at `rq/`."""
    store_values([100, 110, 105, 120, 130])
    for number in range(5):
        store_archive([a_signal(market_id="510372")], at=START + timedelta(hours=number))
    fields = {"data": b'["f", null, ["x"], {}]', "status": b"failed", "origin": b"history"}
    plant(redis, "j", fields, result=failure("no"))
    with web_servers(request.param, tmp_path, monkeypatch) as url:
        yield url


@pytest.mark.parametrize("listing", _LISTINGS)
@pytest.mark.parametrize("form", ["json", "csv"])
def test_the_link_header_leads_to_the_last_page_of_a_listing(site: str, listing: str, form: str) -> None:
    """Each address is resolved as RFC 8288 says: against the address of its answer."""
    answers: list[httpx.Response] = []
    url = str(httpx.URL(f"{site}history/{listing}").copy_merge_params({"limit": 2, "format": form}))
    while url:
        assert url.startswith(f"{site}history/trading/")
        answers.append(httpx.get(url))
        assert answers[-1].status_code == 200
        url = urljoin(url, answers[-1].links["next"]["url"]) if "next" in answers[-1].links else ""
    rows = [answer.text.splitlines()[1:] if form == "csv" else answer.json() for answer in answers]
    assert [len(page) for page in rows] == [2, 2, 1]


@pytest.mark.parametrize("prefix", ["", "/bot"])
def test_the_link_header_also_leads_to_the_next_page_without_a_proxy(database_url: str, prefix: str) -> None:
    """Also in another app that includes the router, and for a client that resolves it against the server's root."""
    store_values([100, 110, 105])
    host = FastAPI()
    host.include_router(router, prefix=prefix)
    with TestClient(host) as client:
        answer = client.get(f"{prefix}/trading/portfolio-history?limit=2")
        link = answer.links["next"]["url"]
        assert [len(client.get(one).json()) for one in (urljoin(str(answer.url), link), urljoin("/", link), link)] == [
            1
        ] * 3


def test_the_server_of_the_openapi_document_leads_to_each_endpoint(site: str) -> None:
    """Its address is resolved against the address of the document."""
    where = f"{site}history/openapi.json"
    document = httpx.get(where).json()
    (server,) = document["servers"]
    base = urljoin(where, server["url"]).rstrip("/")
    statuses = {path: httpx.get(base + path).status_code for path in document["paths"]}
    assert statuses.pop("/trading/signals") == 422  # market_id is missing
    assert set(statuses.values()) == {200}


@pytest.mark.parametrize("path", ["history", "rq"])
def test_the_path_without_its_last_slash_leads_to_the_page(site: str, path: str) -> None:
    answer = httpx.get(site + path, follow_redirects=True, auth=("history", PASSWORD))
    assert (answer.status_code, str(answer.url)) == (200, f"{site}{path}/")
    assert "<title>" in answer.text


def test_every_address_in_the_pages_of_the_dashboard_is_below_its_path(site: str) -> None:
    """And is answered; addresses of changes accept POST only. No answer sets a cookie."""
    with httpx.Client(base_url=f"{site}rq/", auth=("history", PASSWORD), follow_redirects=True) as client:
        answers = {page: client.get(page) for page in pages(["j"])}
        found = {
            one
            for answer in answers.values()
            for one in re.findall(
                '(?:href|src|action)="(/[^"]*)|"[a-z_]+_url": ?"([^"]+)|var url = "([^"]+)', answer.text
            )
        }
        addresses = {"".join(one) for one in found}
        assert {one for one in addresses if not one.startswith("/rq/")} == set()
        changes = {one for one in addresses if one.endswith(("/empty", "/compact")) or "/requeue/" in one}
        linked = {one: client.get(urljoin(site, one)) for one in addresses}
    assert {page: answer.status_code for page, answer in answers.items()} == dict.fromkeys(answers, 200)
    assert {one for one, answer in linked.items() if answer.status_code != (405 if one in changes else 200)} == set()
    assert len(changes) >= 2
    assert [one for one, answer in linked.items() if "set-cookie" in answer.headers] == []


def test_headers_of_a_client_cannot_move_an_address(site: str) -> None:
    """Such as X-Forwarded-Prefix, which nginx passes on."""
    with httpx.Client(auth=("history", PASSWORD)) as client:
        for path in (*(f"history/{one}" for one in ("", "openapi.json", *_LISTINGS)), "rq/", "rq/0/view/jobs"):
            url = httpx.URL(site + path)
            limited = url.copy_merge_params({"limit": 2}) if "trading" in path else url
            plain, forged = client.get(limited), client.get(limited, headers=_FORGED)
            assert (forged.status_code, forged.text) == (200, plain.text)
            assert [forged.headers.get(name) for name in ("link", "location")] == [plain.headers.get("link"), None]


@pytest.mark.parametrize("root_path", ["/trading", "/bots/one/"])
def test_a_request_is_answered_with_and_without_the_root_path(
    database_url: str, monkeypatch: pytest.MonkeyPatch, root_path: str
) -> None:
    """The proxy sends it, a probe or a scrape that reaches the server directly does not."""
    monkeypatch.setenv("HISTORY_API_ROOT_PATH", root_path)
    below = root_path.rstrip("/")
    with TestClient(app, follow_redirects=False) as client:
        for path in ("/", "/healthz", "/metrics", "/page/newest"):
            assert [client.get(one).status_code for one in (path, below + path)] == [200, 200]
        assert client.get(f"{below}/trading/portfolio-history").status_code == 200
        assert [client.get(one).status_code for one in (f"{below}/nowhere", f"{below}x/healthz", f"/x{below}/")] == [
            404
        ] * 3
        redirected = client.get(below)
        assert (redirected.status_code, redirected.headers["location"]) == (307, f"{below}/")


@pytest.mark.parametrize(
    "value", ["history", "//evil.example", "/a b", "/a?b", "/a#b", "/../a", "/a/./b", "/a%2Fb", "/é"]
)
def test_a_root_path_that_is_no_path_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HISTORY_API_ROOT_PATH", value)
    with pytest.raises(SettingsError, match="^HISTORY_API_ROOT_PATH: must be a path such as /history"):
        ApiSettings.from_environment()
