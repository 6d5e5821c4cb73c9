"""Settings of the store: where PostgreSQL is."""

from __future__ import annotations

from urllib.parse import quote

from pydantic import Field, SecretStr

from producers.errors import SettingsError
from producers.settings import EnvironmentSettings


class StoreSettings(EnvironmentSettings):
    database_url: SecretStr | None = Field(None, alias="DATABASE_URL")
    host: str | None = Field(None, alias="POSTGRES_HOST")
    port: int = Field(5432, alias="POSTGRES_PORT", ge=1, le=65535)
    database: str = Field("trading_history", alias="POSTGRES_DB")
    user: str | None = Field(None, alias="POSTGRES_USER")
    password: SecretStr | None = Field(None, alias="POSTGRES_PASSWORD")

    @property
    def is_set(self) -> bool:
        return self.database_url is not None or self.host is not None

    def url(self) -> SecretStr:
        """A libpq-style URL: DATABASE_URL, else one made of the POSTGRES_ variables.

        Raises:
            SettingsError: neither DATABASE_URL nor POSTGRES_HOST is set.
        """
        if self.database_url is not None:
            return self.database_url
        if self.host is None:
            raise SettingsError(
                "DATABASE_URL is not set (for example postgresql://user@localhost/trading_history)"
            )
        login = "" if self.user is None else quote(self.user, safe="")
        if self.password is not None:
            login += ":" + quote(self.password.get_secret_value(), safe="")
        server = f"{login}@{self.host}:{self.port}" if login else f"{self.host}:{self.port}"
        return SecretStr(f"postgresql://{server}/{quote(self.database, safe='')}")
