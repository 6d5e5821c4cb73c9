"""Messages of servers and libraries, without the passwords of our settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, quote, unquote

from consumers.errors import first_line

# Greedy: a password that ought to be percent-encoded may have an @ itself.
_LOGIN = re.compile(r"//[^:@]*:(.*)@", re.DOTALL)
_SECRET_NAMES = ("pass", "secret", "token")


@dataclass(frozen=True)
class Mask:
    """Replaces these texts in messages by `***`."""

    secrets: tuple[str, ...]

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Every password in the two URLs, as it stands there and decoded, and POSTGRES_PASSWORD."""
        found: set[str] = set()
        for url in (environment.get("DATABASE_URL", ""), environment.get("REDIS_URL", "")):
            found.update(_passwords(url))
        found.update(_spellings([environment.get("POSTGRES_PASSWORD", "")]))
        return cls(tuple(sorted(filter(None, found), key=len, reverse=True)))

    def masked_first_line(self, error: BaseException) -> str:
        """The first line of its message, or the name of its type, without the secrets."""
        text = first_line(error)
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
