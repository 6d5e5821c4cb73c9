"""Settings of a consumer: where PostgreSQL is, who may log in there, and where its metrics are."""

from __future__ import annotations

from urllib.parse import quote

from pydantic import Field, SecretStr

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
