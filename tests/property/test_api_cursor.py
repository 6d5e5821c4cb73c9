"""Cursors return the keys that they were made from, and no other text is accepted."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.db.archive_queries import SIGNAL_KEYS
from consumers.db.portfolio_queries import SNAPSHOT_KEYS
from consumers.web.api.cursor import MAX_LENGTH, decode_cursor, encode_cursor
from consumers.web.api.problems import Problem

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_bigints = st.integers(-(2**63), 2**63 - 1)
_instants = st.datetimes(datetime(1970, 1, 1), datetime(9998, 12, 31), timezones=st.just(UTC))


@given(day=st.dates(), moment=_instants, row_id=_bigints)
def test_a_cursor_returns_the_keys_it_was_made_from(day: object, moment: datetime, row_id: int) -> None:
    """To the microsecond, and not longer than the API accepts."""
    place = dict(zip(SNAPSHOT_KEYS, (day, moment, row_id), strict=True))
    cursor = encode_cursor("snapshots", place)
    assert decode_cursor("snapshots", SNAPSHOT_KEYS, cursor) == place
    assert len(cursor) <= MAX_LENGTH


@pytest.mark.parametrize(
    "place",
    [
        {"archived_at": _EPOCH, "id": 2**63},
        {"archived_at": _EPOCH, "id": -(2**63) - 1},
        {"archived_at": _EPOCH, "id": date(2026, 11, 22)},
        {"archived_at": date(2026, 11, 22), "id": 1},
        {"archived_at": _EPOCH},
    ],
)
def test_a_valid_checksum_with_other_values_is_a_client_error(place: dict[str, object]) -> None:
    """The check needs no secret, so anybody can compute it."""
    with pytest.raises(Problem, match="^cursor: is not a cursor of this API$") as raised:
        decode_cursor("archives", ("archived_at", "id"), encode_cursor("archives", place))
    assert raised.value.status == 422


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_any_other_text_is_a_client_error(text: str) -> None:
    """It raises Problem 422 and no other error."""
    with pytest.raises(Problem) as raised:
        decode_cursor("signals", SIGNAL_KEYS, text)
    assert raised.value.status == 422
