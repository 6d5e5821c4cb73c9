"""The model: conditions that hold after every step, and others that hold when everything works again."""

from __future__ import annotations

from collections import Counter, defaultdict

from tests.faults.accepted import Delivery
from tests.faults.verdict import KeptEntry
from tests.property.delivery.servers import Outcome, Row, Stored
from tests.property.delivery.world import Seen


class Model:
    """All deliveries that ever were in an outbox, and what has been allowed to be lost.

    `excused` are deliveries that the operator has destroyed: no outbox keeps them. `lost` are those whose row or
    outcome the database has lost: a resend must bring it back, and before it a receipt may name a lost row. `disturbed`
    says that Redis has lost something or that there are copies: a job may be in two places then, or in none for a time.
    """

    def __init__(self) -> None:
        self.deliveries: dict[str, Delivery] = {}
        self.excused: set[str] = set()
        self.lost: set[str] = set()
        self.disturbed = False
        self._lost_rows: list[Row] = []
        self._has_old_receipts = False  # an outbox was replaced by a copy, which may be older than the last resend
        self._rows: dict[str, Row] = {}
        self._withdrawn: list[Row] = []
        self._decided: set[str] = set()

    # ---- facts that change what must be true

    def forget_entries(self, seen: Seen) -> None:
        """Excuse the undecided deliveries that no outbox keeps any more, after an outbox was replaced or destroyed."""
        self._has_old_receipts = True
        kept = seen.job_ids_kept
        self.excused |= {job_id for job_id in self.deliveries if job_id not in kept} - self._decided

    def lose_commits(self, seen: Seen) -> None:
        """Take over what the database holds after it has lost commits."""
        self._lost_rows += [*self._rows.values(), *self._withdrawn]
        self._rows, self._withdrawn = {row.event_id: row for row in seen.stored.rows}, seen.stored.withdrawn
        before, self._decided = self._decided, self._decided_now(seen.stored)
        self.lost |= before - self._decided
        self.excused |= self.lost - seen.job_ids_kept

    # ---- after every step

    def check(self, seen: Seen) -> None:
        """Check everything that must be true at any time."""
        self._note_entries(seen)
        self._check_rows(seen.stored)
        decided = self._decided_now(seen.stored)
        self.lost -= decided
        vanished = self._decided - decided
        assert not vanished, f"had a row or an outcome before: {self._named(vanished)}"
        self._decided = decided
        unsettled: set[str] = set()
        for kept in seen.entries.values():
            for entry in kept:
                self._check_entry(entry, seen.stored)
                if entry.state in ("pending", "sent"):
                    unsettled.add(entry.delivery.job_id)
        nowhere = self.deliveries.keys() - decided - unsettled - self.lost - self.excused
        assert not nowhere, f"neither unsettled in an outbox nor in the database: {self._named(nowhere)}"
        for job_id, text in seen.queued.acknowledged.items():
            if job_id in self.deliveries and job_id not in self.lost:
                outcome = text.split(" ", 2)[2]
                kind, _, detail = outcome.partition(":")
                self._check_answer(self.deliveries[job_id], kind, detail, seen.stored, "its acknowledgement")
        if not self.disturbed:
            self._check_places(seen)

    def check_recorded(self, returned: list[tuple[str, int]], contents: list[str], seen: Seen) -> None:
        """Check that the events of a call that has returned are in an outbox, by their sources and sequences."""
        kept: defaultdict[tuple[str, int], set[str]] = defaultdict(set)  # copies of an outbox may use a number twice
        for entries in seen.entries.values():
            for entry in entries:
                kept[entry.delivery.source, entry.delivery.sequence].add(entry.delivery.content)
        missing = [(one, content) for one, content in zip(returned, contents, strict=False) if content not in kept[one]]
        assert not missing, f"recorded, but not in the outbox: {missing}"

    def _note_entries(self, seen: Seen) -> None:
        for kept in seen.entries.values():
            for entry in kept:
                one = entry.delivery
                assert self.deliveries.setdefault(one.job_id, one) == one, f"two events of one job id: {one}"
                self.excused.discard(one.job_id)  # a copy of the outbox has come back

    def _check_rows(self, stored: Stored) -> None:
        counts = Counter(row.event_id for row in stored.rows)
        twice = [event_id for event_id, count in counts.items() if count > 1]
        assert not twice, f"two rows of one event: {twice}"
        rows = {row.event_id: row for row in stored.rows}
        withdrawn = {(row.event_id, row.content) for row in stored.withdrawn}
        numbers = {(row.event_id, row.row_id) for row in stored.withdrawn}
        for event_id, row in self._rows.items():
            kept = rows.get(event_id) == row or (event_id, row.row_id) in numbers
            assert kept, f"a row was changed or removed: {row}, now {rows.get(event_id)}"
        for row in rows.values():
            assert (row.event_id, row.content) not in withdrawn, f"stored again after it was withdrawn: {row}"
        accepted = {_identity(one): one for one in self.deliveries.values()}
        for event_id in rows.keys() - self._rows.keys():
            row = rows[event_id]
            # A relay may have sent an entry that the same step has destroyed, so only its own text says what it was.
            assert (row.source, row.sequence, row.event_id, row.content) in accepted, f"a row of no event: {row}"
        self._rows, self._withdrawn = rows, stored.withdrawn

    def _check_entry(self, entry: KeptEntry, stored: Stored) -> None:
        job_id = entry.delivery.job_id
        if job_id in self.lost:
            return
        if entry.state == "stored":
            self._check_answer(entry.delivery, "stored", str(entry.row_id), stored, "its receipt")
        elif entry.state == "rejected":
            self._check_answer(entry.delivery, "rejected", entry.reason or "", stored, "its receipt")

    def _check_answer(self, one: Delivery, kind: str, detail: str, stored: Stored, by: str) -> None:
        """Check that an answer about a delivery agrees with the database."""
        if kind == "rejected":
            outcome = stored.outcomes.get(one.job_id)
            recorded = outcome is not None and outcome.outcome in ("rejected", "discarded")
            # It was requeued, and then stored: the relay learns that soon.
            assert recorded or one.job_id in self._decided_now(stored), f"{by} says rejected, nothing recorded: {one}"
        else:
            rows = [row for row in (*stored.rows, *stored.withdrawn, *self._lost_rows) if row.event_id == one.event_id]
            right = any((str(row.row_id), row.content) == (detail, one.content) for row in rows)
            assert right, f"{by} says {kind} as row {detail}, but there are {rows}: {one}"

    def _decided_now(self, stored: Stored) -> set[str]:
        """Return the jobs of deliveries that have their own row, or had it until it was withdrawn, or an outcome."""
        rows = (*stored.rows, *stored.withdrawn)
        own = {(row.source, row.sequence, row.event_id, row.content) for row in rows}
        with_row = {job_id for job_id, one in self.deliveries.items() if _identity(one) in own}
        return with_row | (self.deliveries.keys() & stored.outcomes.keys())

    def _check_places(self, seen: Seen) -> None:
        """Check that the job of each sent entry is in exactly one list, or has been answered."""
        places = Counter(seen.queued.active())
        for kept in seen.entries.values():
            for entry in kept:
                job_id = entry.delivery.job_id
                answered = job_id in seen.queued.acknowledged or job_id in seen.queued.failed
                if (outcome := seen.stored.outcomes.get(job_id)) is not None:
                    # A discard deletes the job, also one whose worker died before it acknowledged the rejection. The
                    # relay sends the entry again when it is overdue.
                    answered = answered or outcome.outcome == "discarded"
                assert places[job_id] <= 1, f"its job is in {places[job_id]} places: {entry}"
                assert entry.state != "sent" or places[job_id] or answered, f"sent, but its job is nowhere: {entry}"

    # ---- at the end

    def check_end(self, seen: Seen) -> None:
        """Check the accounts when nothing is left to do.

        Accepted events are the sum of rows, duplicates, rejections, discards, withdrawals, and those that are excused.
        """
        if not self._has_old_receipts:
            self._lost_rows.clear()
        self.check(seen)
        open_entries = [one for kept in seen.entries.values() for one in kept if one.state in ("pending", "sent")]
        assert not open_entries, f"never settled: {open_entries}"
        assert self.lost <= self.excused, f"not stored again by a resend: {self._named(self.lost - self.excused)}"
        counts: Counter[str] = Counter()
        withdrawn = {(row.source, row.sequence, row.event_id, row.content) for row in seen.stored.withdrawn}
        own: set[tuple[str, int, str, str]] = set()
        for job_id, one in self.deliveries.items():
            outcome = seen.stored.outcomes.get(job_id)
            if outcome is not None:
                counts[outcome.outcome] += 1
                self._check_outcome(one, outcome, seen.stored)
            elif job_id not in self._decided:
                assert job_id in self.excused, f"lost: {one}"
                counts["excused"] += 1
            else:  # copies of an outbox may record one event under one number: that is one row and a duplicate of it
                kind = "withdrawal" if _identity(one) in withdrawn else "row"
                counts["duplicate" if _identity(one) in own else kind] += 1
                own.add(_identity(one))
        right = (counts["row"], counts["withdrawal"]) == (len(seen.stored.rows), len(seen.stored.withdrawn))
        assert right, f"{dict(counts)}, but {len(seen.stored.rows)} rows and {len(seen.stored.withdrawn)} withdrawals"
        assert sum(counts.values()) == len(self.deliveries)

    def _check_outcome(self, one: Delivery, outcome: Outcome, stored: Stored) -> None:
        rows = [row for row in (*stored.rows, *stored.withdrawn) if row.event_id == one.event_id]
        same = any(row.content == one.content for row in rows)
        if outcome.outcome == "duplicate":
            assert same, f"a duplicate of no row with its content: {one}, {rows}"
        elif outcome.reason is not None and "is stored already" in outcome.reason:
            assert rows, f"a conflict with no row: {one}"
        elif outcome.reason is not None and outcome.reason.startswith("withdrawn:"):
            assert same, f"rejected as withdrawn, but it was not: {one}, {rows}"
        assert outcome.outcome == "duplicate" or outcome.reason, f"rejected without a reason: {one}"

    def _named(self, job_ids: set[str]) -> list[Delivery]:
        return [self.deliveries[job_id] for job_id in sorted(job_ids)]


def _identity(one: Delivery) -> tuple[str, int, str, str]:
    return one.source, one.sequence, one.event_id, one.content
