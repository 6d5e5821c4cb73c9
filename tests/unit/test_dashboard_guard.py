"""The host names that RQ Dashboard accepts, and how it names its Redis."""

from __future__ import annotations

import pytest
from flask import Flask

from consumers.settings import DashboardSettings, origin_of
from consumers.web.dashboard.login import Guard
from consumers.web.listening import listen, usual_or_free_port
from producers.errors import SettingsError
from producers.redis_url import place_of, redis_client


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Dash.Example:443/", "https://dash.example"),
        ("HTTP://dash.example:80", "http://dash.example"),
        ("https://dash.example:80/x?y", "https://dash.example:80"),
        ("http://[::1]:9181", "http://[::1]:9181"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("null", None),
        ("https://", None),
        ("https://h:99999", None),
        ("ftp://h", None),
        ("http://[", None),
    ],
)
def test_an_origin_is_written_as_browsers_write_it(url: str, origin: str | None) -> None:
    assert origin_of(url) == origin


def test_letter_case_and_the_default_port_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the setting nor in the headers that a proxy sends."""
    monkeypatch.setenv("HISTORY_DASHBOARD_URL", "https://Dash.Example:443/")
    monkeypatch.setenv("HISTORY_DASHBOARD_PASSWORD", "p")
    app = Flask("guarded")
    Guard.of(DashboardSettings.from_environment(), local=True).protect(app)
    app.add_url_rule("/", view_func=lambda: "in", methods=["POST"])
    client = app.test_client()

    def status(host: str, origin: str = "https://dash.example") -> int:
        return client.post("/", headers={"Host": host, "Origin": origin}, auth=("history", "p")).status_code

    assert [status(host) for host in ("dash.example", "dash.example:443", "DASH.EXAMPLE")] == [200] * 3
    assert [status(host) for host in ("dash.example:8443", "x.example")] == [421] * 2
    assert [status("dash.example", f"https://{name}") for name in ("x.example", "dash.example:8443")] == [403] * 2


@pytest.mark.parametrize("url", ["https://h:99999/", "https://:443/", "http://[/", "ftp://h/", "https://me:s3cret@h/"])
def test_a_dashboard_url_without_an_origin_or_with_a_password_is_an_error(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HISTORY_DASHBOARD_URL", url)
    with pytest.raises(SettingsError, match="^HISTORY_DASHBOARD_URL: ") as caught:
        DashboardSettings.from_environment()
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://me:s3cret@h:1/2", "database 2 on h, port 1"),
        ("rediss://h", "database 0 on h, port 6379, by TLS"),
        ("unix://me:s3cret@/run/r.sock?db=1", "database 1 on /run/r.sock"),
        ("redis+sentinel://me:s3cret@a:1,b/m/3", "database 3 on the master of m, by Sentinel a:1, b:26379"),
        ("rediss+sentinel://a/m", "database 0 on the master of m, by TLS, by Sentinel a:26379"),
    ],
)
def test_a_redis_server_is_named_without_user_and_password(url: str, place: str) -> None:
    assert place_of(redis_client(url)) == place


def test_a_command_reports_why_it_listens_at_another_port(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        other = usual_or_free_port("RQ Dashboard", port)
    with other:
        assert other.getsockname()[1] != port
    why = f"RQ Dashboard uses another port this time: cannot listen at 127.0.0.1 port {port}: Address already in use\n"
    assert capsys.readouterr().err == why
