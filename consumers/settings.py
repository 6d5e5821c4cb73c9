"""Settings of the consumers' processes, one class each, read once from the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, field_validator

from producers.errors import SettingsError
from producers.settings import EnvironmentSettings


class StoreSettings(EnvironmentSettings):
    """One variable is enough to mean a database: the other POSTGRES_ ones have the defaults of docker-compose.yml."""

    database_url: SecretStr | None = Field(None, alias="DATABASE_URL")
    host: str = Field("localhost", alias="POSTGRES_HOST")
    port: int = Field(5432, alias="POSTGRES_PORT", ge=1, le=65535)
    database: str = Field("trading_history", alias="POSTGRES_DB")
    user: str = Field("trading_history", alias="POSTGRES_USER")
    password: SecretStr | None = Field(None, alias="POSTGRES_PASSWORD")

    @property
    def is_set(self) -> bool:
        return bool(self.model_fields_set)

    def url(self) -> SecretStr:
        """A libpq-style URL: DATABASE_URL, else one made of the POSTGRES_ variables.

        Raises:
            SettingsError: neither DATABASE_URL nor any POSTGRES_ variable is set.
        """
        if self.database_url is not None:
            return self.database_url
        if not self.is_set:
            raise SettingsError("DATABASE_URL is not set (for example postgresql://user@localhost/trading_history)")
        login = quote(self.user, safe="")
        if self.password is not None:
            login += ":" + quote(self.password.get_secret_value(), safe="")
        # A host that is the folder of a unix socket cannot stand where URLs have hosts.
        folder = self.host.startswith("/")
        names = [""] if folder else [f"[{name}]" if ":" in name else name for name in self.host.split(",")]
        hosts = ",".join(f"{name}:{self.port}" for name in names)
        query = f"?host={quote(self.host, safe='')}" if folder else ""
        return SecretStr(f"postgresql://{login}@{hosts}/{quote(self.database, safe='')}{query}")


class LoginSettings(EnvironmentSettings):
    """The passwords that `init-db` gives to its two login roles; a role without one is left alone."""

    writer_password: SecretStr | None = Field(None, alias="HISTORY_WRITER_PASSWORD")
    reader_password: SecretStr | None = Field(None, alias="HISTORY_READER_PASSWORD")


class MetricsSettings(EnvironmentSettings):
    """Where a worker answers scrapes; nowhere without a port. Port 0 is any that is free."""

    host: str = Field("127.0.0.1", alias="HISTORY_METRICS_HOST")
    port: int | None = Field(None, alias="HISTORY_METRICS_PORT", ge=0, le=65535)


class LogSettings(EnvironmentSettings):
    """Whether log lines are text or JSON."""

    log: Literal["text", "json"] = Field("text", alias="HISTORY_LOG")


class EmbeddedSettings(EnvironmentSettings):
    """Folder of the embedded servers; None is the usual place for this user's data."""

    home: Path | None = Field(None, alias="HISTORY_HOME")


def _split(text: object) -> object:
    return tuple(text.replace(",", " ").split()) if isinstance(text, str) else text


def _usable(token: SecretStr) -> SecretStr:
    if not token.get_secret_value().isascii() or any(char.isspace() for char in token.get_secret_value()):
        raise ValueError("must be ASCII without blanks, as an HTTP header can carry it")
    return token


class ApiSettings(EnvironmentSettings):
    """What protects the read API."""

    # None: whoever reaches the API may read.
    token: Annotated[SecretStr, AfterValidator(_usable)] | None = Field(None, alias="HISTORY_API_TOKEN")
    # Web pages of these origins may read, such as https://example.org; none by default.
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field((), alias="HISTORY_API_CORS_ORIGINS")


DASHBOARD_USER = "history"  # one account: the password decides
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
    """The password of RQ Dashboard's one account, and the address at which browsers reach it."""

    password: SecretStr | None = Field(None, alias="HISTORY_DASHBOARD_PASSWORD")
    # Where browsers find it: the history page links there, and behind a proxy this is the name and the path asked for.
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
