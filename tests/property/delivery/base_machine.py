"""The frame of the machine: what is checked after each step and at the end, and what actions share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from consumers.ops.audit import SourceAudit, audit
from producers.outbox import Outbox
from tests.property.delivery.bots import Bot
from tests.property.delivery.faults import Fault
from tests.property.delivery.model import Model, check_lease
from tests.property.delivery.statistics import Statistics, Step
from tests.property.delivery.workers import SteppedWorker
from tests.property.delivery.world import WORKERS, Contents, World

_BEFORE_OR_AFTER = ("before", "after")
_AT_COMMIT = ("before commit", "after commit", "lost before commit", "lost after commit")
_ROUNDS = 15  # of time passing at the end, until nothing may be left to do

F = TypeVar("F", bound=Callable[..., Any])

numbers = st.integers(0, 7)  # an index, modulo the length of the list
workers = st.integers(0, WORKERS - 1)


def faults(operations: int, *also: str, commits: int = 0) -> st.SearchStrategy[Fault | None]:
    """Return a strategy: None, or a fault at one of the first `operations` of an action.

    With `commits`, twice as often the process dies at one of the first commits, or loses its connection to PostgreSQL.
    """
    choices: list[Any] = [
        st.none(),
        st.none(),
        st.tuples(st.integers(1, operations), st.sampled_from(_BEFORE_OR_AFTER + also)),
    ]
    if commits:
        choices += [st.tuples(st.integers(1, commits), st.sampled_from(_AT_COMMIT))] * 2
    return st.one_of(choices)


def counted(method: F) -> F:
    """Note each run of an action."""

    @wraps(method)
    def noted(self: BaseMachine, **given: Any) -> None:
        what = given.get("what")
        self.statistics.actions[method.__name__ + (f" {what}" if what else "")] += 1
        self.statistics.faults += given.get("fault") is not None
        self.steps.append(Step(method.__name__, given))
        with self.statistics.noting_failure(self.steps):
            method(self, **given)

    return noted  # type: ignore[return-value]


def action(when: Callable[[Any], bool] = lambda machine: True, weight: int = 1, **arguments: Any) -> Callable[[F], Any]:
    """Make a method a rule for the times `when` it can do something, chosen `weight` times as often as others."""

    def decorated(method: F) -> Any:
        made = precondition(when)(rule(**arguments)(counted(method)))  # type: ignore[no-untyped-call]
        made.when, made.weight = when, weight
        return made

    return decorated


def has_entries_and_another(action: str) -> Callable[[BaseMachine], bool]:
    """Return the condition that there are entries, and that the last step was another action than this one."""
    return lambda machine: bool(machine.model.deliveries) and machine.steps[-1].action != action


class BaseMachine(RuleBasedStateMachine):
    """Actions on a `world`, each followed by a check of the `model`."""

    def __init_subclass__(cls) -> None:
        # Hypothesis chooses among the names of a class.
        for name, method in list(vars(cls).items()):
            for number in range(1, getattr(method, "weight", 1)):
                setattr(cls, f"{name}_{number}", method)

    def __init__(self, world: World, statistics: Statistics) -> None:
        super().__init__()
        self.world, self.statistics, self.model = world, statistics, Model()
        self.steps: list[Step] = []
        statistics.examples += 1
        world.reset()

    @property
    def contents(self) -> Contents:
        """The content of all storages now."""
        return self.world.read()

    def bot(self, number: int) -> Bot:
        return self.world.bots[number % len(self.world.bots)]

    def worker(self, number: int) -> SteppedWorker:
        return self.world.workers[number]

    @invariant()
    def check_model(self) -> None:
        with self.statistics.noting_failure(self.steps):
            self.model.check(self.contents)
            for worker in self.world.workers:
                if worker.has_lease:
                    check_lease(worker.reserved, worker.reservations.list_key, self.contents.queued)
        self.statistics.note_state(self.contents, self.model)

    def teardown(self) -> None:
        try:
            with self.statistics.noting_failure(self.steps):
                self._recover()
                self.model.check_end(self.contents)
                self._check_outboxes()
        finally:
            self.world.clear()

    def _check_outboxes(self) -> None:
        sources: list[list[tuple[str, bool]]] = []
        audits: list[SourceAudit] = []
        for bot in self.world.bots:
            with Outbox(bot.path) as outbox:
                sources.append([(one.full_name, one.current) for one in outbox.sources()])
                audits += audit(self.world.faulty_redis, outbox)
        self.model.check_sources(sources)
        self.model.check_audits(audits)

    def _recover(self) -> None:
        """Let time pass, relays sweep and workers run, until nothing is left to do."""
        self.stop_workers()
        for bot in self.world.bots:
            bot.close()
            bot.use_outbox()
            if bot.needs_resend:
                bot.resend()
        for _ in range(_ROUNDS):
            self.let_time_pass(400)
            self.worker(0).maintain(None)
            self._sweep_all()
            self.worker(0).run(500, None)
            self._sweep_all()
            if self.world.is_quiet():
                return

    def _sweep_all(self) -> None:
        for bot in self.world.bots:
            while bot.sweep("first"):
                pass

    def stop_workers(self) -> None:
        for worker in self.world.workers:
            worker.stop(None)

    def let_time_pass(self, seconds: int) -> None:
        acknowledged = self.contents.queued.acknowledged.keys()
        self.world.clock.pass_time(seconds, self.world.plain_redis)
        self.world.note_writes()
        for worker in self.world.workers:
            worker.pass_time(seconds)
        if acknowledged - self.contents.queued.acknowledged.keys():
            # They expire after 7 days. The relay sends these entries again when they are overdue, as duplicates.
            self.model.disturbed = True
