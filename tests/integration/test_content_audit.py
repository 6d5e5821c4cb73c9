"""`audit --content` finds each event whose content in the database is not what was recorded."""

from __future__ import annotations

import json
import os
import re
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.db.stored_content import contents_by_number
from consumers.db.withdrawals import withdraw
from consumers.errors import SealError
from consumers.ops.content_audit import ContentAudit, Difference, audit_content
from consumers.ops.seal import read_seal, write_seal
from producers.errors import EventRejected
from producers.events import encode, event_of
from producers.history_producer import HistoryProducer, Receipt
from producers.outbox import Outbox
from producers.segments import Segment
from tests.deliveries import history_queue
from tests.documents import block
from tests.factories import a_snapshot, an_archive

Work = Callable[[], None]
Chains = Mapping[str, Sequence[Segment]]

# Statements that the owner of the tables may execute.
_DIRECT = "UPDATE portfolio_history SET balance = 1, source = 'direct', sequence = NULL WHERE sequence = 2"
_FORGED = """
INSERT INTO event_outcomes (job_id, source, sequence, event_id, outcome, reason, event)
SELECT 'forged', :source, 2, :event_id, '{outcome}', 'forged', :event
"""
_WITHDRAWN = """
INSERT INTO withdrawals (event_id, source, sequence, row_id, content, reason, actor, created_at)
SELECT event_id, source, sequence, id, to_jsonb(portfolio_history), 'forged', 'owner', created_at
FROM portfolio_history WHERE sequence = 2
"""


@pytest.fixture
def receipts(producer: HistoryProducer, work: Work) -> list[Receipt]:
    """Record 1-3: snapshots; 4: an archive; 5: a duplicate of 1; 6: a conflict with 1."""
    receipts = [producer.record(a_snapshot(after=timedelta(n))) for n in range(3)]
    receipts += [producer.record(an_archive()), producer.record(a_snapshot()), producer.record(a_snapshot(balance=1))]
    _deliver(producer, work, receipts[:5])
    with pytest.raises(EventRejected):
        receipts[5].wait(5)
    return receipts


@pytest.fixture
def chains(receipts: list[Receipt], producer: HistoryProducer, tmp_path: Path) -> Chains:
    """The digests of the recorded events, which are the same from kept entries, from deleted ones, and in a seal."""
    outbox = _outbox(producer)
    chains = _chains(outbox)
    assert outbox.deliveries.prune(keep_seconds=-1) == 6
    assert _chains(outbox) == chains
    write_seal(tmp_path / "seal", chains)
    assert read_seal(tmp_path / "seal").chains == chains
    return chains


def _deliver(producer: HistoryProducer, work: Work, receipts: Sequence[Receipt]) -> None:
    producer.flush(5)
    work()
    for receipt in receipts:
        receipt.wait(5)


def _outbox(producer: HistoryProducer) -> Outbox:
    return Outbox(producer._transport.outbox.path)


def _chains(outbox: Outbox) -> Chains:
    return {source.full_name: outbox.digest_chain(source.id) for source in outbox.sources()}


def _audited(chains: Chains, first: int = 1) -> ContentAudit:
    (found,) = audit_content(chains, dict.fromkeys(chains, first)).values()
    return found


def _differing(chains: Chains) -> list[int]:
    found = _audited(chains)
    assert found.differing == sum(one.last - one.first + 1 for one in found.differences)
    return [one.first for one in found.differences]


def _execute(statement: str, **values: Any) -> None:
    with get_db() as db:
        assert db.execute(text(statement), values).rowcount != 0


def test_unchanged_rows_equal_the_outbox(chains: Chains) -> None:
    found = _audited(chains)
    assert (found.checked, found.differing, found.differences) == (6, 0, [])


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ("UPDATE portfolio_history SET balance = balance + 0.00000001 WHERE sequence = 2", [2]),
        ("UPDATE portfolio_history SET total_profit_loss = -total_profit_loss", [1, 2, 3, 5]),
        ("UPDATE portfolio_history SET portfolio_id = 2 WHERE sequence = 3", [3]),
        ("UPDATE portfolio_history SET portfolio_id = NULL WHERE sequence = 3", [3]),
        ("UPDATE portfolio_history SET snapshot_date = snapshot_date - 1 WHERE sequence = 3", [3]),
        (
            """UPDATE portfolio_history SET timestamp = timestamp + interval '1 microsecond' WHERE sequence = 1""",
            [1, 5],
        ),
        ("""UPDATE portfolio_history SET timestamp = 'infinity' WHERE sequence = 1""", [1, 5]),
        ("UPDATE portfolio_history SET timestamp = '9999-12-31 23:59:59Z' WHERE sequence = 1", [1, 5]),
        ("UPDATE portfolio_history SET timestamp = '0001-01-01 00:00:00Z' WHERE sequence = 1", [1, 5]),
        ("UPDATE portfolio_history SET event_id = gen_random_uuid() WHERE sequence = 2", [2]),
        ("UPDATE portfolio_history SET trade_count = 3 WHERE sequence = 2", [2]),
        ("""UPDATE signal_archives SET signals_data = jsonb_set(signals_data, '{1,amount}', '121')""", [4]),
        ("UPDATE signal_archives SET signals_data = jsonb_set(signals_data, '{0,reason}', 'null')", [4]),
        (f"UPDATE signal_archives SET signals_data = jsonb_set(signals_data, '{{0,amount}}', '{'9' * 9000}')", [4]),
        ("UPDATE signal_archives SET archive_month = '2026-12'", [4]),
        ("DELETE FROM portfolio_history WHERE sequence = 2", [2]),
        ("DELETE FROM portfolio_history WHERE sequence = 1", [1, 5]),
        ("DELETE FROM event_outcomes WHERE sequence = 5", [5]),
        ("DELETE FROM event_outcomes WHERE sequence = 6", [6]),
        ("UPDATE event_outcomes SET event = replace(event, '100', '101') WHERE sequence = 6", [6]),
        ("UPDATE event_outcomes SET event = '[]' WHERE sequence = 6", [6]),
    ],
)
def test_each_change_by_the_owner_of_the_tables_is_found(chains: Chains, change: str, differing: list[int]) -> None:
    _execute(change)
    assert _differing(chains) == differing


@pytest.mark.parametrize(
    "changes",
    [
        [_DIRECT, _FORGED.format(outcome="duplicate")],
        [_DIRECT, _FORGED.format(outcome="rejected")],
        ["DELETE FROM portfolio_history WHERE sequence = 2", _FORGED.format(outcome="rejected")],
        ["DELETE FROM portfolio_history WHERE sequence = 2", _FORGED.format(outcome="duplicate")],
        [_WITHDRAWN, "UPDATE portfolio_history SET balance = 1 WHERE sequence = 2"],
        ["UPDATE portfolio_history SET balance = 1 WHERE sequence = 2", _WITHDRAWN],
    ],
)
def test_forged_outcomes_and_withdrawals_do_not_hide_a_change(
    receipts: list[Receipt], chains: Chains, changes: list[str]
) -> None:
    """A rejection, a duplicate or a withdrawal that never happened does not hide a row that was changed."""
    event = _original(receipts[1])
    for change in changes:
        values = {"source": receipts[1].source, "event_id": receipts[1].event_id, "event": event}
        _execute(change, **{name: value for name, value in values.items() if f":{name}" in change})
    assert _differing(chains) == [2]


def _original(receipt: Receipt) -> str:
    return encode(event_of(a_snapshot(after=timedelta(1)), source=receipt.source, sequence=receipt.sequence))


def test_a_rejection_that_was_requeued_and_stored_does_not_differ(
    receipts: list[Receipt], chains: Chains, work: Work
) -> None:
    """The row that blocked it was withdrawn before the requeue. A change of its row is found."""
    with get_db() as db:
        withdraw(db, receipts[0].event_id, "wrong", "operator")
    registry = history_queue(Redis.from_url(os.environ["REDIS_URL"])).failed_job_registry
    registry.requeue(*registry.get_job_ids())
    work()
    assert _differing(chains) == []
    _execute("UPDATE portfolio_history SET balance = 2 WHERE sequence = 6")
    assert _differing(chains) == [6]


@pytest.mark.parametrize("is_corrected", [False, True])
def test_a_withdrawn_event_is_compared_with_its_withdrawal(
    receipts: list[Receipt], chains: Chains, producer: HistoryProducer, work: Work, *, is_corrected: bool
) -> None:
    for receipt in (receipts[1], receipts[3]):
        with get_db() as db:
            withdraw(db, receipt.event_id, "wrong", "operator")
    if is_corrected:
        corrected = (
            producer.record(a_snapshot(after=timedelta(1), balance=5)),
            producer.record(an_archive(signals=[{}])),
        )
        _deliver(producer, work, corrected)
    assert _differing(chains) == []
    _execute("UPDATE withdrawals SET content = jsonb_set(content, '{balance}', '\"1\"') WHERE sequence = 2")
    _execute("UPDATE withdrawals SET content = content - 'archive_month' WHERE sequence = 4")
    assert _differing(chains) == [2, 4]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE portfolio_history SET id = id + 1000, created_at = now() + interval '1 day'",
        "UPDATE portfolio_history SET balance = balance * 1.0",
        "UPDATE event_outcomes SET event_id = NULL WHERE outcome = 'rejected'",
        "UPDATE signal_archives SET signals_data = jsonb_set(signals_data, '{0,amount}', '120.000')",
    ],
)
def test_changes_that_keep_each_value_do_not_differ(chains: Chains, change: str) -> None:
    _execute(change)
    assert _differing(chains) == []


@pytest.mark.parametrize(("minutes", "hours"), [(-30, (0, 1, -23)), (30, (0, -1, 23))])
def test_a_duplicate_in_another_zone_does_not_differ(
    producer: HistoryProducer, work: Work, minutes: int, hours: tuple[int, ...]
) -> None:
    """Its own month is another one than that of the stored row. A month of another zone, or of none, differs."""
    instant = datetime(2027, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
    times = [instant.astimezone(timezone(timedelta(hours=hour))) for hour in hours]
    archives = [an_archive(archived_at=one) for one in times]
    stored, other = archives[0].archive_month, archives[1].archive_month
    assert {stored, other} == {"2026-12", "2027-01"}
    _deliver(producer, work, [producer.record(archive) for archive in archives])
    chains = _chains(_outbox(producer))
    assert _differing(chains) == []
    _execute("UPDATE signal_archives SET archive_month = :month", month=other)
    assert _differing(chains) == [1]
    _execute("UPDATE signal_archives SET archive_month = '2026-11'")
    assert _differing(chains) == [1, 2, 3]


def test_each_copy_of_an_outbox_audits_the_events_that_it_recorded(
    producer: HistoryProducer, work: Work, tmp_path: Path
) -> None:
    """Both use the same numbers. An older copy that was put back checks what it has recorded."""
    _deliver(producer, work, [producer.record(a_snapshot())])
    copy = tmp_path / "copy" / "outbox.db"
    copy.parent.mkdir()
    path = producer._transport.outbox.path
    with closing(sqlite3.connect(path)) as opened, closing(sqlite3.connect(copy)) as copied:
        opened.backup(copied)
    _deliver(producer, work, [producer.record(a_snapshot(after=timedelta(n))) for n in (1, 2)])
    with HistoryProducer(Redis.from_url(os.environ["REDIS_URL"]), outbox=copy) as other:
        _deliver(other, work, [other.record(a_snapshot(after=timedelta(n))) for n in (3, 4)])
        for outbox in (_outbox(producer), _outbox(other)):
            for _ in range(2):
                chains = {name: segments for name, segments in _chains(outbox).items() if segments}
                assert sum(len(one.sequences) for segments in chains.values() for one in segments) == 3
                assert [one.differing for one in audit_content(chains, {}).values()] == [0] * len(chains)
                outbox.deliveries.prune(keep_seconds=-1)


def test_a_conflict_between_two_copies_of_an_outbox_does_not_differ(
    producer: HistoryProducer, work: Work, tmp_path: Path
) -> None:
    """Both use one number for one fact with other content: one of them is a row, the other one is rejected."""
    _deliver(producer, work, [producer.record(a_snapshot())])
    path, copy = producer._transport.outbox.path, tmp_path / "copy.db"
    with closing(sqlite3.connect(path)) as opened, closing(sqlite3.connect(copy)) as copied:
        opened.backup(copied)
    with HistoryProducer(Redis.from_url(os.environ["REDIS_URL"]), outbox=copy) as other:
        _deliver(producer, work, [producer.record(a_snapshot(after=timedelta(1)))])
        rejected = other.record(a_snapshot(after=timedelta(1), balance=5))
        _deliver(other, work, [])
        with pytest.raises(EventRejected):
            rejected.wait(5)
        for outbox in (_outbox(producer), _outbox(other)):
            chains = {name: segments for name, segments in _chains(outbox).items() if segments}
            assert [one.differences for one in audit_content(chains, {}).values()] == [[]] * len(chains)


@pytest.mark.parametrize("amount", [r"\udc00", r"\ud800120\ud800"])
def test_a_withdrawal_with_a_lone_surrogate_differs(receipts: list[Receipt], chains: Chains, amount: str) -> None:
    """JSON in a text can have one; an event cannot."""
    with get_db() as db:
        withdraw(db, receipts[3].event_id, "wrong", "operator")
    changed = f"""replace(content ->> 'signals_data', '"amount": 120', '"amount": "{amount}"')"""
    with get_db() as db:
        db.exec_driver_sql(
            f"UPDATE withdrawals SET content = jsonb_set(content, '{{signals_data}}', to_jsonb({changed}))"
        )
    assert _differing(chains) == [4]


def test_events_without_a_portfolio_do_not_differ(producer: HistoryProducer, work: Work) -> None:
    payloads = (a_snapshot(portfolio_id=None), an_archive(portfolio_id=None), a_snapshot(portfolio_id=None))
    _deliver(producer, work, [producer.record(payload) for payload in payloads])
    assert _differing(_chains(_outbox(producer))) == []


def test_signals_that_are_not_a_list_differ(producer: HistoryProducer, work: Work) -> None:
    """The owner of the table has dropped its constraints."""
    _deliver(producer, work, [producer.record(an_archive()), producer.record(an_archive())])
    for name in ("data_is_an_array", "count_is_the_length"):
        with get_db() as db:
            db.execute(text(f"ALTER TABLE signal_archives DROP CONSTRAINT signal_archives_{name}"))
    _execute("UPDATE signal_archives SET signals_data = 'null'")
    assert _differing(_chains(_outbox(producer))) == [1, 2]


def test_sources_that_a_time_leaves_out_are_not_compared(
    receipts: list[Receipt], producer: HistoryProducer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows may have been moved away. Without the outbox, only the database knows which sources are newer."""
    seal = tmp_path / "seal"
    write_seal(seal, _chains(_outbox(producer)))
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "missing.db"))
    for table in ("portfolio_history", "signal_archives", "event_outcomes"):
        _execute(f"UPDATE {table} SET created_at = '2020-01-01'")
    _execute("DELETE FROM portfolio_history WHERE sequence IN (1, 2)")
    run = _run("--against", seal, "--since", "2026-01-01")
    assert (run.returncode, "compared" in run.stdout) == (0, False)
    assert "1 source left out" in run.stderr
    assert _run("--against", seal).returncode == 1


def test_numbers_below_the_first_one_are_left_out(chains: Chains) -> None:
    """Their rows may have been moved to another table."""
    _execute("DELETE FROM portfolio_history WHERE sequence IN (1, 2)")
    found = _audited(chains, first=3)
    assert (found.checked, [one.first for one in found.differences]) == (4, [5])


def test_the_head_finds_a_change_that_the_first_bytes_do_not_show(chains: Chains) -> None:
    """Its digest may begin with the same bytes. Then its segment is named."""
    _execute("UPDATE portfolio_history SET balance = 1 WHERE sequence = 2")
    (own,) = _digests_of(2, *chains)
    ((source, (segment,)),) = chains.items()
    prefixes = segment.prefixes[:8] + own[:8] + segment.prefixes[16:]
    assert _audited({source: [replace(segment, prefixes=prefixes)]}).differences == [
        Difference(1, 6, "one of these events has other content than was recorded")
    ]


def _digests_of(number: int, source: str) -> list[bytes]:
    with get_db() as db:
        return [one.digest or b"" for one in contents_by_number(db, source, [number])]


def test_each_difference_says_what_the_database_has(chains: Chains) -> None:
    _execute("UPDATE portfolio_history SET id = 1000, balance = 1 WHERE sequence = 2")
    _execute("DELETE FROM portfolio_history WHERE sequence = 3")
    _execute("UPDATE event_outcomes SET event = NULL WHERE sequence = 6")
    assert _audited(chains).differences == [
        Difference(2, 2, "row 1000 of portfolio_history has other content than was recorded"),
        Difference(3, 3, "the database has neither a row nor an outcome"),
        Difference(6, 6, "the text of the rejected event is not the one that was recorded"),
    ]


def test_a_difference_names_a_withdrawal_and_an_outcome_without_a_row(receipts: list[Receipt], chains: Chains) -> None:
    with get_db() as db:
        withdraw(db, receipts[1].event_id, "wrong", "operator")
    _execute("""UPDATE withdrawals SET id = 2000, content = jsonb_set(content, '{balance}', '"1"')""")
    _execute("DELETE FROM portfolio_history WHERE sequence = 1")
    assert _audited(chains).differences == [
        Difference(1, 1, "the database has neither a row nor an outcome"),
        Difference(2, 2, "withdrawal 2000 of withdrawals has other content than was recorded"),
        Difference(5, 5, "its row is missing: the database has only an outcome"),
    ]


@pytest.fixture
def environment(producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTORY_OUTBOX", str(producer._transport.outbox.path))


def _arguments_of(commands: str) -> list[list[str]]:
    return [line.split()[2:] for line in commands.splitlines()]


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "consumers.cli", "audit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_compares_content_and_names_the_first_rows_that_differ(
    receipts: list[Receipt], environment: None
) -> None:
    source = receipts[0].source
    (arguments,) = _arguments_of(block("consumers/ops/CONTENT.md", "content"))
    same = _run(*arguments)
    assert (same.returncode, same.stderr) == (0, "")
    assert f"{source}: 6 events compared with the outbox, all are equal.\n" in same.stdout
    _execute("UPDATE portfolio_history SET balance = 1, id = 77 WHERE sequence = 2")
    assert _run().returncode == 0
    changed = _run("--content")
    assert changed.returncode == 1
    assert (
        f"{source}: 6 events compared with the outbox, 1 differs:\n"
        "  number 2: row 77 of portfolio_history has other content than was recorded\n"
    ) in changed.stdout
    documented = block("consumers/ops/CONTENT.md", "output").replace("14,412", "6")
    documented = re.sub("^.*?: ", f"{source}: ", documented).replace("8121", "2").replace("8119", "77")
    assert documented in changed.stdout
    (result,) = json.loads(_run("--content", "--json").stdout)
    assert (result["content"]["checked"], result["content"]["differing"], result["against"]) == (6, 1, None)
    assert result["content"]["differences"][0]["first"] == 2


def test_a_seal_finds_a_change_without_the_outbox(
    receipts: list[Receipt], environment: None, producer: HistoryProducer, tmp_path: Path
) -> None:
    """The owner of the database may have changed the outbox too, but not a seal that is kept elsewhere."""
    seal = tmp_path / "seal"
    to_seal, to_compare = [
        [*arguments[:-1], str(seal)] for arguments in _arguments_of(block("consumers/ops/CONTENT.md", "seal"))
    ]
    made = _run(*to_seal)
    assert made.returncode == 0
    assert f"6 events sealed in {seal}" in made.stderr
    again = _run("--seal", seal)
    assert (again.returncode, again.stderr.count("\n"), again.stdout) == (1, 1, made.stdout)
    assert "exists, and a seal is never overwritten" in again.stderr

    assert _run("--content", "--against", seal, "--seal", tmp_path / "later").returncode == 0
    assert (tmp_path / "later").read_text().splitlines()[1:-1] == seal.read_text().splitlines()[1:-1]

    producer._transport.outbox.path.unlink()
    assert _run(*to_compare).returncode == 0
    _execute("DELETE FROM portfolio_history")
    _execute("DELETE FROM signal_archives")
    _execute("DELETE FROM event_outcomes")
    gone = _run("--against", seal)
    assert gone.returncode == 1
    assert re.search(f"{receipts[0].source}: 6 events compared with the seal of 20[-0-9: ]+Z, 6 differ:\n", gone.stdout)
    (result,) = json.loads(_run("--against", seal, "--json").stdout)
    assert (result["source"], result["against"]["differing"]) == (receipts[0].source, 6)


def test_a_seal_in_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SealError, match="cannot write the seal .*missing/seal: No such file or directory"):
        write_seal(tmp_path / "missing" / "seal", {})


def test_all_differences_are_counted_and_the_first_hundred_are_kept() -> None:
    found = ContentAudit()
    for number in range(1, 103):
        found.add(number, number, "differs")
    assert (found.differing, len(found.differences), found.differences[-1].first) == (102, 100, 100)


def test_a_seal_on_a_full_disk_is_removed(receipts: list[Receipt], producer: HistoryProducer, tmp_path: Path) -> None:
    """It could be written again later, under the same name."""
    chains = _chains(_outbox(producer))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(SealError, match="cannot write the seal .*: File too large. It was removed"):
            write_seal(tmp_path / "seal", chains)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "seal").exists()


def test_without_an_outbox_the_command_says_what_it_needs(
    database_url: str, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "missing.db"))
    for option in (["--content"], ["--seal", str(tmp_path / "seal")]):
        run = _run(*option)
        assert run.returncode == 1
        assert f"there is no outbox at {tmp_path / 'missing.db'}: set HISTORY_OUTBOX" in run.stderr
    assert not (tmp_path / "seal").exists()
    missing = _run("--against", tmp_path / "missing")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "cannot read the seal" in missing.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda seal: seal[:-40], "is not a complete seal"),
        (lambda seal: seal[: seal.rindex("{")], "is not a complete seal"),
        (lambda seal: seal.replace('"ranges": [[1, 6]]', '"ranges": [[1, 5]]'), "was cut off or changed"),
        (lambda seal: seal.replace("seal 1", "seal 2"), "of another version of this program"),
        (lambda seal: "", "is not a complete seal"),
        (lambda seal: "[]\n[]\n", "is not a complete seal"),
        (lambda seal: "\0é", "is not a complete seal"),
        (lambda seal: "[" * 100_000, "is not a complete seal"),
    ],
)
def test_a_damaged_seal_is_refused(
    receipts: list[Receipt], producer: HistoryProducer, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    write_seal(tmp_path / "seal", _chains(_outbox(producer)))
    damaged = tmp_path / "damaged"
    damaged.write_text(change((tmp_path / "seal").read_text()))
    run = _run("--against", damaged)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: {damaged} ")
    assert message in run.stderr
    assert "Traceback" not in run.stderr
