"""What became of a delivery, as a worker tells it and a relay reads it.

The text is `stored:<row id>`, `duplicate:<row id>` or `rejected:<reason>`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

logger = logging.getLogger(__name__)

# Long enough for a controller that is away over a long weekend; a lost acknowledgement only costs a re-send.
ACKNOWLEDGEMENT_TTL_SECONDS = 7 * 24 * 3600

_END_OF_NUMBERS = 2**63  # neither SQLite nor PostgreSQL has a larger one

Kind = Literal["stored", "duplicate", "rejected"]


@dataclass(frozen=True)
class Outcome:
    """One delivery's end. `row_id` is set unless it was rejected, `reason` only when it was."""

    kind: Kind
    row_id: int | None = None
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.reason if self.kind == 'rejected' else self.row_id}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for anything but the three forms."""
        kind, colon, detail = text.partition(":")
        if kind == "rejected" and colon:
            return cls("rejected", reason=detail)
        if kind in ("stored", "duplicate"):
            return cls(cast("Kind", kind), row_id=int(detail))
        raise ValueError(f"not an acknowledgement: {text[:60]!r}")


def read_acknowledgements(told: Mapping[Any, Any], source: str) -> list[tuple[int, Outcome]]:
    """By sequence, what Redis has of this source: text or bytes, as its client gives it.

    Anybody may have written there: what is no acknowledgement is left out, with a line in the log.
    """
    read = []
    for sequence, text in ((shown(field), shown(value)) for field, value in told.items()):
        try:
            outcome = Outcome.parse(text)
            if not sequence.isdecimal() or max(int(sequence), outcome.row_id or 0) >= _END_OF_NUMBERS:
                raise ValueError("out of range")
            read.append((int(sequence), outcome))
        except ValueError:  # also for a number of thousands of digits
            what = "dropped an acknowledgement that is none, for sequence %s"
            logger.warning(what, sequence[:30], extra={"source": source})
    return read


def shown(value: str | bytes) -> str:
    """As text, whether the client decodes answers or not; what is no text gets signs that no acknowledgement has."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
