"""Settings of the transport, from environment variables and then from `.env` in the working directory.

This is plain Pydantic, not pydantic-settings: a stock `rq worker` imports this module once per event, and the larger
library would take another 0.1 s of CPU each time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
)
from redis import Redis

from producers.errors import SettingsError
from producers.redis_keys import KEY_PREFIX
from producers.redis_url import redis_client
from producers.times import zone_named

_SERVICE_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://[^/@\s]+:\d+")


def read_environment(*, dotenv: bool = True) -> dict[str, str]:
    """Return the variables of the environment and, with `dotenv`, those of `.env` that the environment does not set.

    An empty variable counts as not set. So does a port that is the address of a Kubernetes service: for each service,
    such as `postgres`, Kubernetes sets `POSTGRES_PORT` to `tcp://10.0.0.5:5432` in every pod of its namespace.

    Raises:
        SettingsError: `.env` cannot be read.
    """
    values: dict[str, str] = {}
    if dotenv and Path(".env").is_file():
        from dotenv import dotenv_values

        try:
            values.update(_given(dotenv_values(".env")))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f".env cannot be read: {type(error).__name__}") from None
    values.update(_given(os.environ))
    return values


def _given(variables: Mapping[str, str | None]) -> dict[str, str]:
    """Return the variables that count as set."""
    return {
        name: value
        for name, value in variables.items()
        if value and not (name.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(value))
    }


class EnvironmentSettings(BaseModel):
    """Base class for settings. A field's alias is the name of its environment variable."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        populate_by_name=True,
    )

    @classmethod
    def from_environment(cls, *, dotenv: bool = True) -> Self:
        """Read the settings.

        Raises:
            SettingsError: a variable has a wrong value; the message names the variable and never shows the value.
        """
        try:
            return cls.model_validate(read_environment(dotenv=dotenv))
        except ValidationError as error:
            problem = error.errors(include_input=False, include_context=False, include_url=False)[0]
            reason = problem["msg"].removeprefix("Value error, ")
            raise SettingsError(f"{problem['loc'][0]}: {reason}") from None


class ZoneSettings(EnvironmentSettings):
    """The zone of naive times; None is this machine's zone."""

    timezone: Annotated[ZoneInfo | None, BeforeValidator(zone_named)] = Field(None, alias="HISTORY_TIMEZONE")


def _key_prefix(given: str) -> str:
    if given != (KEY_PREFIX or "rq"):
        raise ValueError("RQ does not read .env: remove RQ_KEY_PREFIX from .env and export it in the environment")
    return given


class KeyPrefixSettings(EnvironmentSettings):
    """Prefix of RQ's keys. RQ has read it already; this finds a value that RQ has not seen."""

    key_prefix: Annotated[str, BeforeValidator(_key_prefix)] = Field("rq", alias="RQ_KEY_PREFIX")


class TransportSettings(ZoneSettings, KeyPrefixSettings):
    """Settings of a controller: Redis, the queue and the outbox."""

    redis_url: SecretStr | None = Field(None, alias="REDIS_URL")
    queue: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]+$")] = Field("history", alias="HISTORY_QUEUE")
    outbox: Path = Field(Path("data/outbox.db"), alias="HISTORY_OUTBOX")
    outbox_keep_days: Annotated[float, Field(ge=0)] = Field(7.0, alias="HISTORY_OUTBOX_KEEP")

    @property
    def outbox_keep_seconds(self) -> float:
        return self.outbox_keep_days * 86400

    def redis(self) -> Redis:
        """Return a client with timeouts of a few seconds and without retries.

        Raises:
            SettingsError: REDIS_URL is not set or not valid.
        """
        if self.redis_url is None:
            raise SettingsError("REDIS_URL is not set (for example redis://localhost:6379/0)")
        return redis_client(self.redis_url.get_secret_value())
