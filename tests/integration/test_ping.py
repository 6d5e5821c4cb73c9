"""Pings of a monitoring service: how it is asked, what it gets, how long it may take, and what is never shown."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import SecretStr

from consumers.errors import PingNotDelivered
from consumers.ops import ping as ping_module
from consumers.ops.ping import ping
from consumers.settings import PingSettings, ping_url
from producers.errors import SettingsError
from tests.monitoring_service import CHECK_ID, monitoring_service, refusing_url, took_at_most


def _not_delivered(url: str, problems: Sequence[str] = ()) -> str:
    """Return the reason, which has no part of the URL but the host. Nothing of it is in the chain of errors either."""
    with pytest.raises(PingNotDelivered) as raised:
        ping(SecretStr(url), problems)
    message = str(raised.value)
    assert CHECK_ID not in message
    assert (raised.value.__cause__, raised.value.__suppress_context__) == (None, True)
    assert message.startswith("the ping to 127.0.0.1 was not delivered: "), message
    return message.partition("not delivered: ")[2]


def test_success_is_a_get_without_a_body() -> None:
    with monitoring_service() as service:
        ping(SecretStr(service.url), [])
    assert [(one.content_type, one.body) for one in service.got] == [(None, "")]
    assert service.lines == ["GET /ping/ID"]


def test_failure_is_a_post_of_the_reasons_as_plain_text() -> None:
    with monitoring_service() as service:
        ping(SecretStr(service.url), ["workers: none", "queue: Zürich"])
    assert service.lines == ["POST /ping/ID/fail"]
    assert service.got[0][1:] == ("text/plain; charset=utf-8", "workers: none\nqueue: Zürich")


@pytest.mark.parametrize(
    ("end", "success", "failure"),
    [
        ("/", "GET /ping/ID/", "POST /ping/ID/fail"),
        ("?create=1", "GET /ping/ID?create=1", "POST /ping/ID/fail?create=1"),
        ("/?a=1&b=/", "GET /ping/ID/?a=1&b=/", "POST /ping/ID/fail?a=1&b=/"),
        ("#part", "GET /ping/ID", "POST /ping/ID/fail"),
    ],
)
def test_failure_url_keeps_the_query_and_ends_with_fail(end: str, success: str, failure: str) -> None:
    with monitoring_service() as service:
        ping(SecretStr(service.url + end), [])
        ping(SecretStr(service.url + end), ["why"])
    assert service.lines == [success, failure]


def test_long_reason_is_cut_at_a_whole_character() -> None:
    with monitoring_service() as service:
        ping(SecretStr(service.url), ["ü" * 10_000])
    assert len(service.got[0].body.encode()) <= 10_000
    assert re.fullmatch(r"ü{4900,}\n\(cut\)", service.got[0].body)


@pytest.mark.parametrize("transient", [500, 502, 503, 429])
def test_a_failure_that_may_pass_is_tried_once_more(transient: int) -> None:
    with monitoring_service(transient, 200) as service, took_at_most(8):
        ping(SecretStr(service.url), ["why"])
    assert service.lines == 2 * ["POST /ping/ID/fail"]
    assert [one.body for one in service.got] == ["why", "why"]


@pytest.mark.parametrize(
    ("answer", "reason", "requests"),
    [
        (500, "HTTP status 500", 2),
        (404, "HTTP status 404", 1),
        ("no HTTP", "BadStatusLine", 2),
        ((200, b"OK (not found)"), 'the service answered "not found"', 1),
        ((200, b"OK (rate limited)"), 'the service answered "rate limited"', 1),
        ((302, "/accounts/login/"), "HTTP status 302 (a redirect to another place: use its URL)", 1),
        ((301, f"http://localhost/ping/{CHECK_ID}"), "HTTP status 301 (a redirect to another place: use its URL)", 1),
        ((302, "file:///etc/passwd"), "HTTP status 302 (a redirect to another place: use its URL)", 1),
    ],
)
def test_a_ping_that_is_not_accepted_is_an_error(answer: Any, reason: str, requests: int) -> None:
    with monitoring_service(answer) as service:
        assert _not_delivered(service.url) == reason
    assert len(service.got) == requests


def test_redirect_to_the_same_path_with_a_slash_keeps_method_and_reason() -> None:
    with monitoring_service((301, f"/ping/{CHECK_ID}/fail/"), 200) as service:
        ping(SecretStr(service.url), ["why"])
    assert service.lines == ["POST /ping/ID/fail", "POST /ping/ID/fail/"]
    assert service.got[1][1:] == ("text/plain; charset=utf-8", "why")


def test_redirects_in_a_circle_end() -> None:
    with monitoring_service((308, f"/ping/{CHECK_ID}/"), (308, f"/ping/{CHECK_ID}")) as service, took_at_most(11):
        assert _not_delivered(service.url).startswith("HTTP status 308")
    assert len(service.got) < 30


def test_refused_connection_is_named() -> None:
    with took_at_most(8):
        assert _not_delivered(refusing_url()) == "Connection refused"


@pytest.mark.parametrize("answer", ["drips", "silent"])
def test_slow_service_takes_at_most_10_seconds(answer: str) -> None:
    """Each wait for the network ends sooner, but a service that sends byte after byte needs the limit of the whole."""
    with monitoring_service(answer) as service, took_at_most(11.5):
        assert re.fullmatch(r"no answer within (4|10) s", _not_delivered(service.url, ["why"]))


def test_name_resolution_that_hangs_takes_at_most_10_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timeout of a socket limits it."""
    never = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: never.wait(60))
    with took_at_most(11.5):
        assert _not_delivered(f"http://127.0.0.1/{CHECK_ID}") == "no answer within 10 s"
    never.set()


@pytest.mark.parametrize("answer", ["drips body", "broken body"])
def test_status_counts_although_the_body_does_not_come(answer: str) -> None:
    with monitoring_service(answer) as service, took_at_most(8):
        ping(SecretStr(service.url), [])
    assert len(service.got) == 1


def test_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As urllib does: http_proxy and no_proxy."""
    with monitoring_service() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.partition("/ping")[0])
        ping(SecretStr(f"http://hc.example/ping/{CHECK_ID}"), [])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with monitoring_service() as service:
            ping(SecretStr(service.url), [])
    assert (proxy.lines, service.lines) == (["GET http://hc.example/ping/ID"], ["GET /ping/ID"])


def test_unexpected_error_does_not_show_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may contain the URL."""

    def fail(*_: object) -> None:
        raise ValueError(f"cannot open {CHECK_ID}")

    monkeypatch.setattr(ping_module, "build_opener", fail)
    assert _not_delivered(refusing_url()) == "ValueError"


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://hc.example/{CHECK_ID}",
        f"file:///{CHECK_ID}",
        f"hc.example/{CHECK_ID}",
        f"https:///{CHECK_ID}",
        f"https://hc.example:99999/{CHECK_ID}",
        f"https://user:pass@hc.example/{CHECK_ID}",
        f"https://hc.example/ {CHECK_ID}",
        f"https://hc.example/{CHECK_ID}\nX: y",
        f"https://hc.example/ü{CHECK_ID}",
        f"https://[::1/{CHECK_ID}",
    ],
)
def test_wrong_url_is_refused_without_showing_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must ") as raised:
        ping_url(url)
    assert CHECK_ID not in str(raised.value)
    monkeypatch.setenv("HISTORY_PING_URL", url)
    with pytest.raises(SettingsError, match="HISTORY_PING_URL: must ") as wrong:
        PingSettings.from_environment()
    assert CHECK_ID not in str(wrong.value)
