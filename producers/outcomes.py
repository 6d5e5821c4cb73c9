"""What became of a delivery, as a worker tells it and a relay reads it.

The text is `stored:<row id>`, `duplicate:<row id>` or `rejected:<reason>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, cast

# Long enough for a controller that is away over a long weekend; a lost acknowledgement only costs a re-send.
ACKNOWLEDGEMENT_TTL_SECONDS = 7 * 24 * 3600

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
