"""Settings of RQ Dashboard."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from producers.settings import EnvironmentSettings

USER = "history"  # one account: the password decides


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
        return url
