"""The model: conditions that hold after every step, and others that hold when everything works again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from consumers.ops.audit import SourceAudit
from producers.events import Payload
from producers.history_producer import Receipt
from tests.faults.accepted import Delivery, content_of
from tests.faults.verdict import KeptEntry
from tests.property.delivery.servers import Outcome, Queued, Row, Stored
from tests.property.delivery.world import Contents

Identity = tuple[str, int | None, str, str]  # source, sequence, event id and content


class Model:
    """All deliveries that ever were in an outbox, and what has been allowed to be lost.

    `unrecoverable` are deliveries that the operator has destroyed: no outbox keeps them. `lost` are those whose row or
    outcome the database has lost: a resend must bring it back, and before it a receipt may name a lost row. `disturbed`
    says that the job of an entry may be in two places, or in none for a time. That begins when Redis loses something,
    an outbox is copied or replaced, a resend deletes acknowledgements, or a stock worker dies. It lasts until the end.
    """

    def __init__(self) -> None:
        self.deliveries: dict[str, Delivery] = {}
        self.unrecoverable: set[str] = set()
        self.lost: set[str] = set()
        self.disturbed = False
        self._lost_rows: list[Row] = []
        self._has_old_receipts = False  # an outbox was replaced by a copy, which may be older than the last resend
        self._rows: dict[str, Row] = {}
        self._withdrawn: list[Row] = []
        self._decided: set[str] = set()
        self.discarding: set[str] = set()  # jobs that an operator has discarded, or tried to
        self._rejected: set[str] = set()  # at any time, also by a withdrawal of their row
        self._ownerless: set[str] = set()  # keys of reserved lists

    # ---- facts that change what must be true

    def forget_entries(self, contents: Contents, *, carried_over: bool) -> None:
        """Note that an outbox was replaced: what the database does not have and no outbox keeps now is unrecoverable.

        If the unsettled entries were `carried_over`, that is allowed only for those that the database has lost.
        """
        self._has_old_receipts = True
        destroyed = self.deliveries.keys() - contents.job_ids_kept - self._decided
        self.unrecoverable |= destroyed & self.lost if carried_over else destroyed

    def lose_owners(self, contents: Contents) -> None:
        """Note that Redis loses the set of owners: no worker knows the lists that they have now, so these may stay."""
        self._ownerless |= contents.queued.reserved.keys()

    def lose_commits(self, contents: Contents) -> None:
        """Take over what the database holds after it has lost commits."""
        self._lost_rows += [*self._rows.values(), *self._withdrawn]
        self._rows, self._withdrawn = {row.event_id: row for row in contents.stored.rows}, contents.stored.withdrawn
        before, self._decided = self._decided, self._decided_now(contents.stored)
        self.lost |= before - self._decided
        self.unrecoverable |= self.lost - contents.job_ids_kept

    # ---- after every step

    def check(self, contents: Contents) -> None:
        """Check everything that must be true at any time."""
        self._note_entries(contents)
        self._check_rows(contents.stored)
        decided = self._decided_now(contents.stored)
        self.lost -= decided
        vanished = self._decided - decided
        assert not vanished, f"had a row or an outcome before: {self._named(vanished)}"
        self._decided = decided
        self._note_rejections(contents.stored)
        unsettled: set[str] = set()
        for kept in contents.entries.values():
            for entry in kept:
                self._check_entry(entry, contents.stored)
                if entry.state in ("pending", "sent"):
                    unsettled.add(entry.delivery.job_id)
        nowhere = self.deliveries.keys() - decided - unsettled - self.lost - self.unrecoverable
        assert not nowhere, f"neither unsettled in an outbox nor in the database: {self._named(nowhere)}"
        for job_id, text in contents.queued.acknowledged.items():
            if job_id in self.deliveries and job_id not in self.lost:
                outcome = text.split(" ", 2)[2]
                kind, _, detail = outcome.partition(":")
                self._check_answer(self.deliveries[job_id], kind, detail, contents.stored, "its acknowledgement")
        if not self.disturbed:
            self._check_places(contents)

    def check_recorded(self, receipts: Sequence[Receipt], recorded: Sequence[Payload], contents: Contents) -> None:
        """Check that each event of a call that has returned has a receipt, and is in an outbox as the receipt says."""
        kept: defaultdict[tuple[str, int], set[str]] = defaultdict(set)  # copies of an outbox may use a number twice
        for entries in contents.entries.values():
            for entry in entries:
                kept[entry.delivery.source, entry.delivery.sequence].add(entry.delivery.content)
        assert len(receipts) == len(recorded), f"{len(receipts)} receipts of {len(recorded)} events"
        for receipt, payload in zip(receipts, recorded, strict=True):
            is_kept = content_of(payload.model_dump()) in kept[receipt.source, receipt.sequence]
            assert is_kept, f"recorded, but not in the outbox: {receipt.source} {receipt.sequence}, {payload}"

    def _note_entries(self, contents: Contents) -> None:
        for kept in contents.entries.values():
            for entry in kept:
                one = entry.delivery
                assert self.deliveries.setdefault(one.job_id, one) == one, f"two events of one job id: {one}"
                self.unrecoverable.discard(one.job_id)  # a copy of the outbox has come back

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
        accepted = _identities(self.deliveries.values())
        for event_id in rows.keys() - self._rows.keys():
            assert _identity(rows[event_id]) in accepted, f"a row of no event: {rows[event_id]}"
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
            # It may have been requeued since then, and have a row or be a duplicate now: the relay learns that soon.
            assert one.job_id in self._rejected, f"{by} says rejected, which it never was: {one}"
        else:
            rows = [row for row in (*stored.rows, *stored.withdrawn, *self._lost_rows) if row.event_id == one.event_id]
            right = any((str(row.row_id), row.content) == (detail, one.content) for row in rows)
            assert right, f"{by} says {kind} as row {detail}, but there are {rows}: {one}"

    def _decided_now(self, stored: Stored) -> set[str]:
        """Return the jobs of deliveries that have their own row, or had it until it was withdrawn, or an outcome."""
        rows = (*stored.rows, *stored.withdrawn)
        return self._with_own(rows) | (self.deliveries.keys() & stored.outcomes.keys())

    def _with_own(self, rows: Iterable[Row]) -> set[str]:
        """Return the jobs of the deliveries that made one of these rows."""
        own = _identities(rows)
        return {job_id for job_id, one in self.deliveries.items() if _identity(one) in own}

    def _note_rejections(self, stored: Stored) -> None:
        self._rejected |= {
            job_id for job_id, one in stored.outcomes.items() if one.outcome in ("rejected", "discarded")
        }
        self._rejected |= self._with_own(stored.withdrawn)

    def _check_places(self, contents: Contents) -> None:
        """Check that the job of each sent entry is in exactly one list, or has been answered."""
        places = Counter(contents.queued.active())
        for kept in contents.entries.values():
            for entry in kept:
                job_id = entry.delivery.job_id
                answered = job_id in contents.queued.acknowledged or job_id in contents.queued.failed
                # A discard deletes the job, also one whose worker died before it acknowledged the rejection, and also
                # if it dies before its own commit. The relay sends the entry again when it is overdue.
                outcome = contents.stored.outcomes.get(job_id)
                if outcome is not None and job_id in self.discarding:
                    answered = answered or outcome.outcome in ("rejected", "discarded")
                assert places[job_id] <= 1, f"its job is in {places[job_id]} places: {entry}"
                assert entry.state != "sent" or places[job_id] or answered, f"sent, but its job is nowhere: {entry}"

    # ---- at the end

    def check_end(self, contents: Contents) -> None:
        """Check the accounts when nothing is left to do.

        Each accepted event is a row, a duplicate, rejected, discarded, withdrawn or unrecoverable.
        """
        if not self._has_old_receipts:
            self._lost_rows.clear()
        self.check(contents)
        entries = [one for kept in contents.entries.values() for one in kept]
        open_entries = [one for one in entries if one.state in ("pending", "sent")]
        assert not open_entries, f"never settled: {open_entries}"
        if not self.disturbed:
            for entry in entries:
                self._check_final(entry, contents.stored)
        active = contents.queued.active(without=self._ownerless)
        assert not active, f"jobs that no worker finishes: {active}, {contents.queued}"
        missing = self.lost - self.unrecoverable
        assert not missing, f"not stored again by a resend: {self._named(missing)}"
        counts: Counter[str] = Counter()
        withdrawn = _identities(contents.stored.withdrawn)
        own: set[Identity] = set()
        for job_id, one in self.deliveries.items():
            outcome = contents.stored.outcomes.get(job_id)
            if outcome is not None:
                counts[outcome.outcome] += 1
                self._check_outcome(one, outcome, contents.stored)
            elif job_id in self._decided:
                # Copies of an outbox may record one event under one number: that is one row and a duplicate of it.
                kind = "withdrawal" if _identity(one) in withdrawn else "row"
                counts["duplicate" if _identity(one) in own else kind] += 1
                own.add(_identity(one))
        right = (counts["row"], counts["withdrawal"]) == (len(contents.stored.rows), len(contents.stored.withdrawn))
        assert right, (
            f"{dict(counts)}, but {len(contents.stored.rows)} rows and {len(contents.stored.withdrawn)} withdrawals"
        )

    def _check_final(self, entry: KeptEntry, stored: Stored) -> None:
        """Check that a rejected entry is rejected in the database too: a relay has read all acknowledgements by now."""
        outcome = stored.outcomes.get(entry.delivery.job_id)
        is_rejected = outcome is not None and outcome.outcome in ("rejected", "discarded")
        if (entry.reason or "").startswith("withdrawn:") and entry.delivery.job_id in self._with_own(stored.withdrawn):
            return  # the withdrawal is the record of its outcome
        right = entry.state != "rejected" or is_rejected
        assert right, f"still rejected for its receipt, but not in the database ({outcome}): {entry}"

    def check_sources(self, outboxes: Sequence[Sequence[tuple[str, bool]]]) -> None:
        """Check the sources of each outbox, by name and whether new events get it. Relays have looked for copies."""
        counts = Counter(name for sources in outboxes for name, is_current in sources if is_current)
        twice = [name for name, count in counts.items() if count > 1]
        assert not twice, f"two outboxes use one source: {twice}"
        if not self.disturbed:
            replaced = [sources for sources in outboxes if len(sources) > 1]
            assert not replaced, f"an outbox that was never copied has more than one source: {replaced}"

    def check_audits(self, audits: Iterable[SourceAudit]) -> None:
        """Check that each audit of a source is complete, unless events are lost for good."""
        incomplete = [] if self.unrecoverable else [one for one in audits if not one.complete]
        assert not incomplete, f"the audit finds events missing: {incomplete}"

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


def check_lease(jobs: Iterable[str], list_key: str, queued: Queued) -> None:
    """Check that the jobs of a worker that has a lease are in its list."""
    taken = set(jobs) - set(queued.reserved.get(list_key, []))
    assert not taken, f"taken from a worker that has a lease: {taken}"


def _identity(one: Delivery | Row) -> Identity:
    return one.source, one.sequence, one.event_id, one.content


def _identities(several: Iterable[Delivery | Row]) -> set[Identity]:
    return {_identity(one) for one in several}
