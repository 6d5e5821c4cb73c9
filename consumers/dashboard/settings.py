"""Settings of RQ Dashboard."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from producers.settings import EnvironmentSettings

USER = "history"  # one account: the password decides

_PORTS = {"http": 80, "https": 443}


def origin_of(url: str) -> str | None:
    """As a browser writes it, `https://rq.example:8443`; None of what has none, such as `null`."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not host:
        return None
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port in (None, _PORTS[parts.scheme]) else f":{port}")


class DashboardSettings(EnvironmentSettings):
    password: SecretStr | None = Field(None, alias="HISTORY_DASHBOARD_PASSWORD")
    # Where browsers find it: the page links there, and behind a proxy this is the name that is asked for.
    url: str | None = Field(None, alias="HISTORY_DASHBOARD_URL")

    @field_validator("url")
    @classmethod
    def _is_a_web_address(cls, url: str | None) -> str | None:
        if url is None:
            return url
        parts = urlsplit(url)
        # It becomes a link: javascript: would run in the page.
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("must be an http:// or https:// URL")
        if "@" in parts.netloc:
            raise ValueError("must be without a password, since it is shown")
        if origin_of(url) is None:
            raise ValueError("must have a host name, and a port from 0 to 65535 if any")
        return url
