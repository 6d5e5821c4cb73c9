"""Settings of the API."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from producers.settings import EnvironmentSettings


def _split(text: object) -> object:
    return tuple(text.replace(",", " ").split()) if isinstance(text, str) else text


def _usable(token: SecretStr) -> SecretStr:
    if not token.get_secret_value().isascii() or any(char.isspace() for char in token.get_secret_value()):
        raise ValueError("must be ASCII without blanks, as an HTTP header can carry it")
    return token


class ApiSettings(EnvironmentSettings):
    # None: whoever reaches the API may read.
    token: Annotated[SecretStr, AfterValidator(_usable)] | None = Field(None, alias="HISTORY_API_TOKEN")
    # Web pages of these origins may read, such as https://example.org; none by default.
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field((), alias="HISTORY_API_CORS_ORIGINS")
