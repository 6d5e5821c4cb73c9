"""Runs of the machine that are worth repeating each time, as plain steps: see tests/property/delivery.

Each test ends like a run of Hypothesis: everything works again, and the accounts are checked.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from producers.outbox import Outbox
from producers.outbox_deliveries import OutboxDeliveries
from tests.property.delivery.machine import DeliveryMachine
from tests.property.delivery.runs import new_world
from tests.property.delivery.shrinking import Shrinking, replay
from tests.property.delivery.statistics import Statistics, Step

SNAPSHOT, OTHER_CONTENT, ANOTHER_SNAPSHOT = ("snapshot", 0, 0), ("snapshot", 0, 1), ("snapshot", 1, 0)


@pytest.fixture
def machine(redis: Redis, database_url: str) -> Iterator[DeliveryMachine]:
    with new_world(redis, database_url) as world:
        machine = DeliveryMachine(world, Statistics())
        yield machine
        machine.teardown()


def _states(machine: DeliveryMachine, bot: int = 0) -> list[str]:
    return [one.state for one in machine.contents.entries[machine.bot(bot)]]


def _store(machine: DeliveryMachine, bot: int = 0) -> None:
    """Let a relay, a worker and the relay again do their work."""
    machine.bot(bot).sweep("first")
    machine.worker(0).run(500)
    machine.bot(bot).sweep("first")
    machine.check_model()


def test_the_same_steps_give_the_same_run(machine: DeliveryMachine) -> None:
    queues = []
    for _ in range(10):
        one = DeliveryMachine(machine.world, Statistics())
        one.begin(events=[SNAPSHOT, ANOTHER_SNAPSHOT, ("archive", 0, 0)])
        for seconds in ([6], [6, 6]):
            for passed in seconds:
                one.clock(what="time", seconds=passed, ahead=0)
            one.sweep(bot=0, relay="first", fault=None)
        one.redis(what="all", which=0)
        one.clock(what="time", seconds=21, ahead=0)
        one.sweep(bot=0, relay="first", fault=None)
        queues.append(one.contents.queued.waiting)
        machine.world.clear()
    machine.world.reset()
    assert queues == [queues[0]] * 10
    assert queues[0]


def test_two_copies_that_use_one_number_settle_their_own_entries(machine: DeliveryMachine) -> None:
    machine.begin(events=[SNAPSHOT])
    _store(machine)
    machine.outbox(what="copy", bot=0, running=True, fault=None)
    machine.record(bot=0, events=[ANOTHER_SNAPSHOT], what="", fault=None)
    machine.record(bot=1, events=[OTHER_CONTENT], what="", fault=None)
    for bot in (0, 1):
        machine.bot(bot).sweep("first")
    machine.worker(0).run(500)
    for bot in (0, 1):
        machine.bot(bot).sweep("first")
        machine.check_model()
    assert _states(machine, 0) == ["stored", "stored"]
    assert _states(machine, 1) == ["stored", "rejected"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_that_dies_at_any_write_acknowledges_nothing_that_is_not_stored(
    machine: DeliveryMachine, when: str
) -> None:
    machine.begin(events=[SNAPSHOT])
    _store(machine)  # the first batch has more writes than the others
    for number in range(1, 15):
        machine.record(bot=0, events=[("archive", number, 0)], what="and send", fault=None)
        machine.worker(0).run(1, (number, when))  # type: ignore[arg-type]
        assert machine.worker(0).kills == number
        machine.check_model()
        machine.clock(what="time", seconds=21, ahead=0)
        machine.worker(1).maintain()
        machine.check_model()


def test_a_worker_that_dies_before_its_commit_has_acknowledged_nothing(machine: DeliveryMachine) -> None:
    machine.begin(events=[SNAPSHOT])
    _store(machine)  # the first batch has more writes than the others
    for number in range(1, 4):  # three crashes would make the event poison
        machine.record(bot=0, events=[("archive", number, 0)], what="and send", fault=None)
        machine.worker(0).reserve(1)
        machine.worker(0).process((number, "before"))
        assert machine.worker(0).reserved == []  # it died
        machine.check_model()
        machine.clock(what="time", seconds=21, ahead=0)
        machine.worker(1).maintain()


def test_a_worker_that_was_paused_beyond_its_lease_completes_what_another_has_stored(machine: DeliveryMachine) -> None:
    machine.begin(events=[SNAPSHOT, OTHER_CONTENT])
    for _ in ("reserve", "process"):
        machine.step_worker(worker=0, limit=2, fault=None)
    machine.clock(what="time", seconds=21, ahead=0)
    machine.between_steps(worker=1, what="maintain", fault=None)
    machine.worker(1).run(500)
    machine.check_model()
    machine.step_worker(worker=0, limit=2, fault=None)
    machine.check_model()
    assert len(machine.contents.stored.rows) == 1


def test_jobs_stay_with_a_worker_as_long_as_its_lease_is_valid(machine: DeliveryMachine) -> None:
    machine.begin(events=[SNAPSHOT])
    machine.step_worker(worker=0, limit=1, fault=None)
    machine.clock(what="time", seconds=6, ahead=0)
    machine.between_steps(worker=1, what="maintain", fault=None)
    machine.check_model()


def test_rows_that_the_database_has_lost_come_back_by_a_resend(machine: DeliveryMachine) -> None:
    machine.database(what="back up", bot=0, commits=1, fault=None)
    machine.begin(events=[SNAPSHOT, ANOTHER_SNAPSHOT])
    machine.worker(0).run(500)  # acknowledged, but not yet settled
    machine.database(what="restore", bot=0, commits=1, fault=None)
    machine.check_model()
    machine.database(what="resend", bot=0, commits=1, fault=None)
    machine.clock(what="time", seconds=400, ahead=0)  # entries that were not settled are checked
    _store(machine)
    assert _states(machine) == ["stored", "stored"]


def test_a_discarded_event_stays_discarded_when_everything_is_sent_again(machine: DeliveryMachine) -> None:
    machine.begin(events=[SNAPSHOT, OTHER_CONTENT])
    _store(machine)
    machine.operator(what="discard", which=0, fault=None)
    machine.database(what="resend", bot=0, commits=1, fault=None)
    _store(machine)
    assert [one.outcome for one in machine.contents.stored.outcomes.values()] == ["discarded"]


def test_an_event_that_is_discarded_before_its_rejection_is_acknowledged_is_sent_again_and_settled(
    machine: DeliveryMachine,
) -> None:
    machine.begin(events=[SNAPSHOT, OTHER_CONTENT])
    machine.worker(0).reserve(2)
    machine.worker(0).process()
    machine.worker(0).renew((1, "before"))  # it dies
    machine.operator(what="discard", which=0, fault=None)
    machine.clock(what="time", seconds=61, ahead=0)
    machine.worker(1).maintain()
    machine.worker(1).run(500)
    machine.check_model()
    machine.clock(what="time", seconds=400, ahead=0)
    _store(machine)
    _store(machine)
    assert _states(machine) == ["stored", "rejected"]
    assert [one.outcome for one in machine.contents.stored.outcomes.values()] == ["discarded"]


def test_a_discard_that_dies_before_its_commit_leaves_the_event_rejected(machine: DeliveryMachine) -> None:
    """Its job is gone from Redis, and its rejection was not acknowledged yet. A second discard succeeds."""
    machine.begin(events=[SNAPSHOT, OTHER_CONTENT])
    machine.worker(0).reserve(2)
    machine.worker(0).process()
    machine.worker(0).renew((1, "before"))  # it dies
    machine.operator(what="discard", which=0, fault=(1, "before commit"))
    machine.clock(what="time", seconds=61, ahead=0)
    machine.worker(1).maintain()
    machine.worker(1).run(500)
    machine.check_model()
    assert [one.outcome for one in machine.contents.stored.outcomes.values()] == ["rejected"]
    machine.operator(what="discard", which=0, fault=None)
    machine.clock(what="time", seconds=400, ahead=0)
    _store(machine)
    _store(machine)
    assert _states(machine) == ["stored", "rejected"]
    assert [one.outcome for one in machine.contents.stored.outcomes.values()] == ["discarded"]


def test_withdrawn_content_stays_out_when_it_is_sent_again_and_corrected_content_is_stored(
    machine: DeliveryMachine,
) -> None:
    machine.begin(events=[SNAPSHOT])
    _store(machine)
    machine.operator(what="withdraw", which=0, fault=None)
    machine.database(what="resend", bot=0, commits=1, fault=None)
    _store(machine)
    assert _states(machine) == ["rejected"]
    machine.record(bot=0, events=[SNAPSHOT, OTHER_CONTENT], what="and store", fault=None)
    machine.check_model()
    assert _states(machine) == ["rejected", "rejected", "stored"]


@pytest.mark.parametrize(
    ("when", "rows"),
    [("before commit", 1), ("lost before commit", 1), ("after commit", 0), ("lost after commit", 0)],
)
def test_a_withdrawal_that_fails_at_its_commit_is_done_or_not_done(
    machine: DeliveryMachine, when: str, rows: int
) -> None:
    machine.begin(events=[SNAPSHOT])
    _store(machine)
    machine.operator(what="withdraw", which=0, fault=(1, when))
    machine.check_model()
    stored = machine.contents.stored
    assert (len(stored.rows), len(stored.withdrawn)) == (rows, 1 - rows)


def test_the_row_that_a_receipt_names_may_be_lost_until_the_resend(machine: DeliveryMachine) -> None:
    machine.begin(events=[SNAPSHOT, OTHER_CONTENT])
    _store(machine)
    machine.database(what="back up", bot=0, commits=1, fault=None)
    machine.operator(what="withdraw", which=0, fault=None)
    machine.operator(what="requeue", which=0, fault=None)
    machine.worker(0).run(500)
    machine.clock(what="time", seconds=61, ahead=0)  # relays look seldom whether a rejected event is stored
    machine.bot(0).sweep("first")
    machine.check_model()
    assert _states(machine) == ["stored", "stored"]
    machine.database(what="restore", bot=0, commits=1, fault=None)
    machine.check_model()
    machine.database(what="resend", bot=0, commits=1, fault=None)
    _store(machine)
    assert _states(machine) == ["stored", "rejected"]


def test_after_a_resend_an_older_outbox_that_is_put_back_needs_a_resend_too(machine: DeliveryMachine) -> None:
    """In the backup, the entry is stored, although the row is lost."""
    machine.begin(events=[SNAPSHOT])
    _store(machine)
    machine.outbox(what="back up", bot=0, running=False, fault=None)
    machine.database(what="lose commits", bot=0, commits=1, fault=None)
    machine.database(what="resend", bot=0, commits=1, fault=None)
    machine.outbox(what="restore", bot=0, running=False, fault=None)
    machine.check_model()
    assert (_states(machine), len(machine.contents.stored.rows)) == (["stored"], 0)
    assert machine.bot(0).resend()
    _store(machine)
    assert (_states(machine), len(machine.contents.stored.rows)) == (["stored"], 1)


def test_an_acknowledgement_that_no_relay_reads_for_seven_days_makes_a_duplicate(machine: DeliveryMachine) -> None:
    machine.begin(events=[SNAPSHOT])
    machine.bot(0).sweep("first")
    machine.worker(0).run(500)
    for _ in range(8):
        machine.clock(what="time", seconds=86_400, ahead=0)
        machine.check_model()
    assert (_states(machine), machine.contents.queued.acknowledged) == (["sent"], {})
    _store(machine)
    _store(machine)
    assert (_states(machine), len(machine.contents.stored.rows)) == (["stored"], 1)
    assert [one.outcome for one in machine.contents.stored.outcomes.values()] == []


def test_a_failing_run_is_shrunk_to_the_steps_that_make_it_fail(machine: DeliveryMachine) -> None:
    machine.begin(events=[SNAPSHOT, OTHER_CONTENT])
    machine.record(bot=1, events=[SNAPSHOT, ANOTHER_SNAPSHOT], what="and send", fault=(3, "before"))
    for _ in range(3):
        machine.clock(what="time", seconds=1, ahead=0)
    no_such_worker = Step("step_worker", {"worker": 9, "limit": 1, "fault": (1, "after")})
    shrinking = Shrinking(machine.world, [*machine.steps, no_such_worker], seconds=60)
    shrinking.run()
    machine.world.reset()
    assert "IndexError" in shrinking.failure
    assert [str(step) for step in shrinking.steps] == [
        "machine.begin(events=[('snapshot', 0, 0)])",
        "machine.step_worker(worker=9, limit=1, fault=None)",
    ]


@pytest.mark.parametrize("what", ["restore", "move"])
def test_a_running_bot_carries_over_the_entries_of_a_file_that_was_replaced(
    machine: DeliveryMachine, what: str
) -> None:
    machine.outbox(what="back up", bot=0, running=True, fault=None)
    machine.record(bot=0, events=[SNAPSHOT], what="", fault=None)
    machine.outbox(what=what, bot=0, running=True, fault=None)
    machine.check_model()
    assert _states(machine) == ["pending"]


def test_a_running_bot_carries_over_two_entries_that_are_recorded_by_two_calls(machine: DeliveryMachine) -> None:
    machine.outbox(what="back up", bot=0, running=True, fault=None)
    for event in (SNAPSHOT, ANOTHER_SNAPSHOT):
        machine.record(bot=0, events=[event], what="", fault=None)
    machine.outbox(what="restore", bot=0, running=True, fault=None)
    machine.check_model()
    assert _states(machine) == ["pending", "pending"]


def test_two_requeues_with_no_worker_between_put_a_job_into_the_queue_once(machine: DeliveryMachine) -> None:
    machine.begin(events=[SNAPSHOT, OTHER_CONTENT])
    _store(machine)
    for _ in range(2):
        machine.operator(what="requeue", which=0, fault=None)
        machine.check_model()
        assert len(machine.contents.queued.active()) == 1


_STORED_AFTER_A_REQUEUE = [
    Step("begin", {"events": [SNAPSHOT, OTHER_CONTENT]}),
    Step("run_worker", {"worker": 0, "max_jobs": 500, "fault": None}),
    Step("sweep", {"bot": 0, "relay": "first", "fault": None}),
    Step("operator", {"what": "withdraw", "which": 0, "fault": None}),
    Step("operator", {"what": "requeue", "which": 0, "fault": None}),
    Step("run_worker", {"worker": 0, "max_jobs": 500, "fault": None}),
]


def test_the_end_requires_that_the_receipt_of_a_requeued_event_says_stored(
    machine: DeliveryMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert replay(machine.world, _STORED_AFTER_A_REQUEUE) == ""
    awaiting = OutboxDeliveries.awaiting
    with monkeypatch.context() as patch:
        patch.setattr(
            OutboxDeliveries, "awaiting", lambda self, state: awaiting(self, state) if state == "sent" else []
        )
        assert "still rejected for its receipt" in replay(machine.world, _STORED_AFTER_A_REQUEUE)
    machine.world.reset()


def test_the_receipt_of_a_requeued_event_says_stored(machine: DeliveryMachine) -> None:
    for step in _STORED_AFTER_A_REQUEUE:
        getattr(machine, step.action)(**step.given)
    assert _states(machine) == ["stored", "rejected"]
    machine.clock(what="time", seconds=61, ahead=0)  # relays look seldom whether a rejected event is stored
    machine.bot(0).sweep("first")
    assert _states(machine) == ["stored", "stored"]


@pytest.mark.parametrize("when", ["before", "after", "before commit", "after commit"])
def test_an_outbox_keeps_its_source_if_its_relay_is_killed_at_any_write(machine: DeliveryMachine, when: str) -> None:
    machine.begin(events=[SNAPSHOT])
    bot, number = machine.bot(0), 0
    while bot.killed_sweeps == number:
        number += 1
        bot.kill()  # each relay begins its turn, and so exchanges the token of the outbox
        machine.record(bot=0, events=[("archive", number, 0)], what="", fault=None)
        bot.sweep("first", (number, when))  # type: ignore[arg-type]
        bot.sweep("first")
        with Outbox(bot.path) as outbox:
            assert len(outbox.sources()) == 1
    assert bot.killed_sweeps > 2


def test_pruning_keeps_an_unsettled_entry_before_a_settled_one(machine: DeliveryMachine) -> None:
    machine.begin(events=[SNAPSHOT, ANOTHER_SNAPSHOT])
    machine.check_model()
    machine.worker(0).reserve(1)  # the job of the first entry, which it keeps
    machine.worker(1).run(500)
    machine.bot(0).sweep("first")
    assert _states(machine) == ["sent", "stored"]
    for _ in range(8):
        machine.clock(what="time", seconds=86_400, ahead=0)
    machine.bot(0).sweep("first")
    machine.check_model()
    assert _states(machine) == ["sent"]
