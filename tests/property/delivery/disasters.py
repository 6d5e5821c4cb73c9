"""Actions that lose, copy or replace what a storage holds, or set clocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from producers.redis_keys import owners_key
from tests.property.delivery.base_machine import BaseMachine, action, faults, has_entries_and_another, numbers
from tests.property.delivery.bots import Bot
from tests.property.delivery.servers import QUEUE
from tests.property.delivery.world import MOST_BOTS

_SNAPSHOT = "consumers.handlers.record_portfolio_snapshot"
_REJECTED_CALLS = (
    (_SNAPSHOT, "{}"),
    (_SNAPSHOT, "[" * 50),
    (_SNAPSHOT, '{"id": 1, "sequence": "x"}'),
    ("os.getcwd", ""),
)
_AN_HOUR, _A_DAY = 3600, 86_400


class Disasters(BaseMachine):
    """Redis, the database, outboxes and clocks."""

    @action(
        when=has_entries_and_another("redis"),
        what=st.sampled_from(["replica stops", "rejected job", "fail over", "key", "all"]),
        which=st.integers(0, 30),
    )
    def redis(self, what: str, which: int) -> None:
        """Lose a key or all keys; let a replica stop, or fail over to it; or enqueue a job that will be rejected."""
        redis, contents = self.world.plain_redis, self.world.redis_contents
        if what == "replica stops":
            self.world.replica = contents.copy()
            return
        if what == "rejected job":
            contents.queue.enqueue(*_REJECTED_CALLS[which % len(_REJECTED_CALLS)], failure_ttl=-1)
            self.world.note_writes()
            return
        if what == "key" and (keys := contents.keys()):
            key = keys[which % len(keys)]
            if key.decode() == owners_key(QUEUE):
                self.model.lose_owners(self.contents)
            redis.delete(key)
        elif what == "all":
            redis.flushall()
        elif what == "fail over" and self.world.replica is not None:
            contents.put_back(self.world.replica)
        self.world.note_writes()
        self.model.disturbed = True
        for worker in self.world.workers:
            worker.has_lease = False

    @action(
        when=has_entries_and_another("database"),
        what=st.sampled_from(["lose commits", "back up", "restore", "resend"]),
        bot=numbers,
        commits=st.integers(1, 3),
        fault=faults(8),
    )
    def database(self, what: str, bot: int, commits: int, fault: Any) -> None:
        """Lose the last commits; back it up or restore it; or have a bot send again what was lost."""
        if what == "back up":
            self.world.old_database = self.contents.stored
        elif what == "resend":
            # Results that a worker still has, and acknowledgements of a replica, would name rows that are lost.
            self.stop_workers()
            self.world.replica = None
            self.model.disturbed = True  # an entry whose acknowledgement is deleted is checked, and sent again, later
            self.bot(bot).resend(fault)
        else:
            self.model.check(self.contents)  # the model must know all that is lost, also in a test without checks
            states = self.world.states_of_database
            old = self.world.old_database if what == "restore" else states[max(-1 - commits, -len(states))]
            if old is not None:
                self.world.replace_database(old)
                self.model.lose_commits(self.contents)

    @action(
        when=has_entries_and_another("outbox"),
        what=st.sampled_from(["copy", "back up", "restore", "move"]),
        bot=numbers, running=st.booleans(), fault=faults(6),
    )  # fmt: skip
    def outbox(self, what: str, bot: int, running: bool, fault: Any) -> None:
        """Copy the folder for another bot, back it up, restore it or move it.

        `running` is for the last two: the producer has the outbox open. Else the bot is stopped first.
        """
        one, world = self.bot(bot), self.world
        has_room = len(world.bots) < MOST_BOTS
        if what == "back up":
            world.back_up(one)
        elif what == "copy" and has_room:
            self.model.disturbed = True
            world.bots.append(world.copy_bot(one))
        elif what == "restore" and one in world.backups:
            self._replace(one, running, fault, lambda: world.restore(one))
        elif what == "move" and (has_room or not running):
            self._replace(one, running, fault, lambda: world.move(one))

    def _replace(self, bot: Bot, running: bool, fault: Any, replace: Callable[[], None]) -> None:
        """Replace the outbox file. If `running`, the producer has it open, and uses it once afterwards.

        That call carries the unsettled entries over to the file at the path, unless the producer dies.
        """
        if running:
            bot.use_outbox()
        else:
            bot.close()
        replace()
        self.world.note_writes()
        if running:
            bot.use_outbox(fault)
        self.model.disturbed = True
        self.model.forget_entries(self.contents, carried_over=running and fault is None)

    @action(
        what=st.sampled_from(["time", "wall clock", "restart"]),
        seconds=st.sampled_from([1, 6, 21, 61, 400, _A_DAY]),
        ahead=st.sampled_from([-40 * 365 * _A_DAY, -2 * _A_DAY, -_AN_HOUR, 0, _AN_HOUR, 2 * _A_DAY, 400 * _A_DAY]),
    )
    def clock(self, what: str, seconds: int, ahead: int) -> None:
        """Let time pass, set the wall clock, or restart the machine with this error of its clock."""
        if what == "time":
            self.let_time_pass(seconds)
            return
        if what == "restart":
            for bot in self.world.bots:
                bot.kill()
            self.world.clock.restart()
        self.world.clock.set_wall_clock(ahead)
