"""Settings of the consumer processes: one class per purpose, read once from the environment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from producers.errors import SettingsError
from producers.settings import EnvironmentSettings


class StoreSettings(EnvironmentSettings):
    """Address of PostgreSQL. One variable is enough; the POSTGRES_ defaults are those of docker-compose.yml.

    With DATABASE_URL, the POSTGRES_ variables are not read, even if their values are wrong.
    """

    database_url: SecretStr | None = Field(None, alias="DATABASE_URL")
    host: str = Field("localhost", alias="POSTGRES_HOST")
    port: int = Field(5432, alias="POSTGRES_PORT", ge=1, le=65535)
    database: str = Field("trading_history", alias="POSTGRES_DB")
    user: str = Field("trading_history", alias="POSTGRES_USER")
    password: SecretStr | None = Field(None, alias="POSTGRES_PASSWORD")

    @model_validator(mode="before")
    @classmethod
    def _url_alone(cls, values: Any) -> Any:
        return {"DATABASE_URL": values["DATABASE_URL"]} if values.get("DATABASE_URL") else values

    @property
    def is_set(self) -> bool:
        """True if at least one of the variables is set."""
        return bool(self.model_fields_set)

    def url(self) -> SecretStr:
        """Return a libpq-style URL: DATABASE_URL if it is set, else one built from the POSTGRES_ variables.

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
        # The folder of a unix socket cannot be in the host part of a URL, so it goes into the query.
        folder = self.host.startswith("/")
        names = [""] if folder else [f"[{name}]" if ":" in name else name for name in self.host.split(",")]
        hosts = ",".join(f"{name}:{self.port}" for name in names)
        query = f"?host={quote(self.host, safe='')}" if folder else ""
        return SecretStr(f"postgresql://{login}@{hosts}/{quote(self.database, safe='')}{query}")


class LoginSettings(EnvironmentSettings):
    """Passwords of the two login roles. `init-db` creates or changes a role only if its password is set."""

    writer_password: SecretStr | None = Field(None, alias="HISTORY_WRITER_PASSWORD")
    reader_password: SecretStr | None = Field(None, alias="HISTORY_READER_PASSWORD")


class MetricsSettings(EnvironmentSettings):
    """Address of a worker's metrics. Without a port there are none; port 0 means any free port."""

    host: str = Field("127.0.0.1", alias="HISTORY_METRICS_HOST")
    port: int | None = Field(None, alias="HISTORY_METRICS_PORT", ge=0, le=65535)


class LogSettings(EnvironmentSettings):
    """Format of the log lines: text or JSON."""

    log: Literal["text", "json"] = Field("text", alias="HISTORY_LOG")


class EmbeddedSettings(EnvironmentSettings):
    """Folder of the embedded servers; None means the default folder of this user."""

    home: Path | None = Field(None, alias="HISTORY_HOME")


def _split(text: object) -> object:
    return tuple(text.replace(",", " ").split()) if isinstance(text, str) else text


def _usable(token: SecretStr) -> SecretStr:
    if not token.get_secret_value().isascii() or any(char.isspace() for char in token.get_secret_value()):
        raise ValueError("must be ASCII without blanks, since it is sent in an HTTP header")
    return token


def _root_path(text: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*/?", text):
        raise ValueError("must be a path such as /history, of letters, digits and -._~")
    return text.rstrip("/")


class ApiSettings(EnvironmentSettings):
    """Access to the read API."""

    # None: every client that reaches the API may read.
    token: Annotated[SecretStr, AfterValidator(_usable)] | None = Field(None, alias="HISTORY_API_TOKEN")
    # Web pages from these origins, such as https://example.org, may read. None by default.
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field((), alias="HISTORY_API_CORS_ORIGINS")
    # Path that a proxy keeps in front of the API's own paths, without a slash at its end. None if it keeps none.
    root_path: Annotated[str, AfterValidator(_root_path)] | None = Field(None, alias="HISTORY_API_ROOT_PATH")


DASHBOARD_USER = "history"  # the only account
_PORTS = {"http": 80, "https": 443}


def origin_of(url: str) -> str | None:
    """Return the origin of a URL as browsers write it (`https://rq.example:8443`), or None if it has none (`null`)."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not host:
        return None
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port in (None, _PORTS[parts.scheme]) else f":{port}")


def _web_address(url: str) -> str:
    parts = urlsplit(url)
    # The page shows it as a link, and a javascript: URL would run there.
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError("must be an http:// or https:// URL")
    if "@" in parts.netloc:
        raise ValueError("must have no password, since the page shows it")
    if origin_of(url) is None:
        raise ValueError("must have a host name; its port, if given, must be from 0 to 65535")
    return url


class DashboardSettings(EnvironmentSettings):
    """Password of RQ Dashboard's only account, its address in browsers, and whether it refuses changes."""

    password: SecretStr | None = Field(None, alias="HISTORY_DASHBOARD_PASSWORD")
    # The history page links to it. Behind a proxy, browsers request this name and path.
    url: Annotated[str, AfterValidator(_web_address)] | None = Field(None, alias="HISTORY_DASHBOARD_URL")
    is_readonly: bool = Field(False, alias="HISTORY_DASHBOARD_READONLY")


def ping_url(text: str) -> SecretStr:
    """Return the URL of a monitoring service's check; the id of the check in it is a secret.

    Raises:
        ValueError: it is not one. The message does not contain it.
    """
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("must be a URL of ASCII characters without blanks")
    if origin_of(text) is None:
        raise ValueError("must be an http:// or https:// URL with a host name")
    if "@" in urlsplit(text).netloc:
        raise ValueError("must have no user and no password")
    return SecretStr(text)


class PingSettings(EnvironmentSettings):
    """URL to which `--ping HISTORY_PING_URL` reports; it is not on the command line, which other users can read."""

    url: Annotated[SecretStr, BeforeValidator(lambda text: ping_url(str(text)))] | None = Field(
        None, alias="HISTORY_PING_URL"
    )
