"""Each check of the model of the delivery fails for small contents that break it, and passes for right ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.documents import ROOT
from tests.factories import a_snapshot
from tests.faults.accepted import Delivery, content_of
from tests.faults.verdict import KeptEntry
from tests.property.delivery.model import Model, check_lease
from tests.property.delivery.servers import Outcome, Queued, Row, Stored
from tests.property.delivery.world import Contents

_PAYLOAD = a_snapshot()
ONE = Delivery("job-1", "bot/1", 1, "event", content_of(_PAYLOAD.model_dump()))
SAME = replace(ONE, job_id="job-2", sequence=2)  # a duplicate of it
OTHER = replace(SAME, content="other")  # a conflict with it
ROW = Row("portfolio_history", 100, ONE.event_id, ONE.source, ONE.sequence, ONE.content)
OTHER_ROW = ROW._replace(sequence=OTHER.sequence, content=OTHER.content)
CONFLICT = Outcome("rejected", "conflict: is stored already")
DUPLICATE = Outcome("duplicate", None)


def _entry(one: Delivery = ONE, state: str = "pending", row_id: int | None = None, reason: str | None = None) -> Any:
    return KeptEntry(one, state, row_id, reason)


PENDING, SENT, STORED = _entry(), _entry(state="sent"), _entry(state="stored", row_id=100)
WAITING = Queued(waiting=["job-1"])


def _contents(
    *entries: KeptEntry,
    rows: Sequence[Row] = (),
    withdrawn: Sequence[Row] = (),
    outcomes: dict[str, Outcome] | None = None,
    queued: Queued | None = None,
    more_outboxes: Sequence[Sequence[KeptEntry]] = (),
) -> Contents:
    """Return contents of outboxes, the first with these entries, of the database, and of Redis."""
    outboxes: Any = {number: list(kept) for number, kept in enumerate([entries, *more_outboxes])}
    return Contents(outboxes, Stored(list(rows), outcomes or {}, list(withdrawn), ""), queued or Queued())


def _check(*several: Contents) -> Model:
    """Check contents as after each of some steps."""
    model = Model()
    for contents in several:
        model.check(contents)
    return model


def _end(*several: Contents) -> None:
    """Check contents as after some steps and at the end, where the last ones are the contents."""
    _check(*several).check_end(several[-1])


def _recorded(receipts: Sequence[Any], *entries: KeptEntry) -> None:
    Model().check_recorded(receipts, [_PAYLOAD], _contents(*entries))


def _sources(*outboxes: Sequence[tuple[str, bool]], disturbed: bool = False) -> None:
    model = Model()
    model.disturbed = disturbed
    model.check_sources(outboxes)


def _audits(*, complete: bool) -> None:
    audit: Any = SimpleNamespace(complete=complete)
    Model().check_audits([audit])


def _lost_rows(*, come_back: bool) -> None:
    """Lose the commit that stored the event, whose entry is stored; then end, perhaps with the row back."""
    model = _check(_contents(PENDING, rows=[ROW]))
    model.lose_commits(_contents(STORED))
    model.check(_contents(STORED))
    rows = [ROW] if come_back else []
    model.check_end(_contents(STORED, rows=rows))


def _destroyed(*, noted: bool) -> None:
    """Replace an outbox by an older one that does not have its pending event."""
    model = _check(_contents(PENDING))
    if noted:
        model.forget_entries(_contents(), carried_over=False)
    model.check(_contents())


REJECTED = _entry(state="rejected", reason=CONFLICT.reason)
WITHDRAWN = _entry(state="rejected", reason="withdrawn: by Ada")
REJECTED_OTHER = _entry(OTHER, "rejected", reason=CONFLICT.reason)

# By message, whose values are {}.
BROKEN: dict[str, Callable[[], object]] = {
    "had a row or an outcome before: {}": lambda: _check(
        _contents(REJECTED, outcomes={"job-1": CONFLICT}), _contents(PENDING)
    ),
    "neither unsettled in an outbox nor in the database: {}": lambda: _destroyed(noted=False),
    "{} receipts of {} events": lambda: _recorded([], PENDING),
    "recorded, but not in the outbox: {} {}, {}": lambda: _recorded([ONE]),
    "two events of one job id: {}": lambda: _check(_contents(PENDING, _entry(replace(OTHER, job_id="job-1")))),
    "two rows of one event: {}": lambda: _check(_contents(STORED, rows=[ROW, ROW._replace(row_id=101)])),
    "a row was changed or removed: {}, now {}": lambda: _check(
        _contents(PENDING, rows=[ROW]), _contents(PENDING, rows=[ROW._replace(row_id=101)])
    ),
    "stored again after it was withdrawn: {}": lambda: _check(
        _contents(PENDING, rows=[ROW._replace(row_id=101)], withdrawn=[ROW])
    ),
    "a row of no event: {}": lambda: _check(_contents(PENDING, rows=[OTHER_ROW])),
    "{} says rejected, which it never was: {}": lambda: _check(_contents(REJECTED, rows=[ROW])),
    "{} says {} as row {}, but there are {}: {}": lambda: _check(
        _contents(PENDING, rows=[ROW], queued=Queued(acknowledged={"job-1": "1 event stored:101"}))
    ),
    "its job is in {} places: {}": lambda: _check(_contents(SENT, queued=Queued(waiting=["job-1"], started=["job-1"]))),
    "sent, but its job is nowhere: {}": lambda: _check(_contents(SENT)),
    "never settled: {}": lambda: _end(_contents(PENDING)),
    "jobs that no worker finishes: {}, {}": lambda: _end(_contents(STORED, rows=[ROW], queued=WAITING)),
    "not stored again by a resend: {}": lambda: _lost_rows(come_back=False),
    "{}, but {} rows and {} withdrawals": lambda: _end(_contents(STORED, rows=[ROW], outcomes={"job-1": DUPLICATE})),
    "still rejected for its receipt, but not in the database ({}): {}": lambda: _end(
        _contents(REJECTED, outcomes={"job-1": CONFLICT}), _contents(REJECTED, rows=[ROW])
    ),
    "two outboxes use one source: {}": lambda: _sources([("bot/1", True)], [("bot/1", True)]),
    "an outbox that was never copied has more than one source: {}": lambda: _sources(
        [("bot/1", False), ("bot/2", True)]
    ),
    "the audit finds events missing: {}": lambda: _audits(complete=False),
    "a duplicate of no row with its content: {}, {}": lambda: _end(
        _contents(PENDING, outcomes={"job-1": DUPLICATE}), _contents(outcomes={"job-1": DUPLICATE})
    ),
    "a conflict with no row: {}": lambda: _end(_contents(REJECTED, outcomes={"job-1": CONFLICT})),
    "rejected as withdrawn, but it was not: {}, {}": lambda: _end(
        _contents(WITHDRAWN, outcomes={"job-1": Outcome("rejected", WITHDRAWN.reason)})
    ),
    "rejected without a reason: {}": lambda: _end(
        _contents(_entry(state="rejected"), outcomes={"job-1": Outcome("rejected", None)})
    ),
    "taken from a worker that has a lease: {}": lambda: check_lease(["job-1"], "list", Queued(reserved={"list": []})),
}
RIGHT: dict[str, Callable[[], object]] = {
    "pending": lambda: _check(_contents(PENDING)),
    "sent": lambda: _check(_contents(SENT, queued=WAITING)),
    "stored": lambda: _end(_contents(PENDING), _contents(SENT, queued=WAITING), _contents(STORED, rows=[ROW])),
    "duplicate": lambda: _end(
        _contents(STORED, _entry(SAME, "stored", 100), rows=[ROW], outcomes={"job-2": DUPLICATE})
    ),
    "conflict": lambda: _end(_contents(STORED, REJECTED_OTHER, rows=[ROW], outcomes={"job-2": CONFLICT})),
    "withdrawn": lambda: _end(_contents(STORED, rows=[ROW]), _contents(STORED, withdrawn=[ROW])),
    "sent again after a withdrawal": lambda: _end(_contents(WITHDRAWN, withdrawn=[ROW])),
    "destroyed by the operator": lambda: _destroyed(noted=True),
    "lost by the database, and sent again": lambda: _lost_rows(come_back=True),
    "recorded": lambda: _recorded([ONE], PENDING),
    "a source replaced after a copy": lambda: _sources(
        [("bot/1", True)], [("bot/1", False), ("bot/2", True)], disturbed=True
    ),
    "a complete audit": lambda: _audits(complete=True),
    "a lease": lambda: check_lease(["job-1"], "list", Queued(reserved={"list": ["job-1"]})),
}


@pytest.mark.parametrize("message", BROKEN)
def test_each_check_fails_for_contents_that_break_it(message: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(message).replace(re.escape("{}"), ".*") + "$"):
        BROKEN[message]()


@pytest.mark.parametrize("name", RIGHT)
def test_each_check_passes_for_contents_that_are_right(name: str) -> None:
    RIGHT[name]()


def _messages(file: str) -> list[str]:
    """Return the messages of all assertions of a file, with {} for their values."""
    found = []
    for node in ast.walk(ast.parse((ROOT / "tests/property/delivery" / file).read_text("utf-8"))):
        if isinstance(node, ast.Assert):
            parts = node.msg.values if isinstance(node.msg, ast.JoinedStr) else [node.msg]
            found.append("".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in parts))
    return found


def test_each_assertion_of_the_model_is_tested() -> None:
    assert sorted(_messages("model.py")) == sorted(BROKEN)
    assert _messages("base_machine.py") == []
