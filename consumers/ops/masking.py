"""Removal of our passwords from the messages of servers and libraries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, quote, unquote

from consumers.errors import first_line

# Greedy, because a password that should be percent-encoded may contain an @.
_LOGIN = re.compile(r"//[^:@]*:(.*)@", re.DOTALL)
_SECRET_NAMES = ("pass", "secret", "token")
_SECRET_SETTINGS = re.compile(r"POSTGRES_PASSWORD|HISTORY_\w+_(PASSWORD|TOKEN)|HISTORY_PING_URL")


@dataclass(frozen=True)
class Mask:
    """Replace each of these secrets in a message by `***`."""

    secrets: tuple[str, ...]

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Return a mask for the passwords in DATABASE_URL and REDIS_URL, and for settings that are secrets.

        They are masked encoded and decoded.
        """
        found: set[str] = set()
        for url in (environment.get("DATABASE_URL", ""), environment.get("REDIS_URL", "")):
            found.update(_passwords(url))
        found.update(_spellings(value for name, value in environment.items() if _SECRET_SETTINGS.fullmatch(name)))
        return cls(tuple(sorted(filter(None, found), key=len, reverse=True)))

    def masked_first_line(self, error: BaseException) -> str:
        """Return the first line of the error's message, or its type's name, without the secrets."""
        return self.masked(first_line(error))

    def masked(self, text: str) -> str:
        """Return the text without the secrets."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def _passwords(url: str) -> Iterator[str]:
    login = _LOGIN.search(url)
    yield from _spellings(login.groups() if login else ())
    for name, value in parse_qsl(url.partition("?")[2]):
        if any(part in name.lower() for part in _SECRET_NAMES):
            yield from _spellings([value])


def _spellings(secrets: Iterable[str]) -> Iterator[str]:
    for secret in secrets:
        yield from (secret, unquote(secret), quote(secret, safe=""), quote(unquote(secret), safe=""))
