"""Counts of what the machine has done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.property.delivery.model import Model
from tests.property.delivery.world import Contents


class Step(NamedTuple):
    """One action of a run, and what it was given."""

    action: str
    given: dict[str, Any]

    def __str__(self) -> str:
        return f"machine.{self.action}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"


class Statistics:
    """Examples, steps, actions by kind, and distinct abstract states."""

    def __init__(self, *, prints: bool = True) -> None:
        self._prints = prints
        self.examples = 0
        self.actions: Counter[str] = Counter()
        self.faults = 0
        self.first_failure = ""
        self.failing: list[Step] = []
        self._states: set[tuple[object, ...]] = set()
        self._began = time.perf_counter()

    @property
    def steps(self) -> int:
        return self.actions.total()

    @contextmanager
    def noting_failure(self, steps: list[Step]) -> Iterator[None]:
        """If the block fails, note that and the steps up to now. Hypothesis runs a failing run once more."""
        try:
            yield
        except BaseException as error:
            if not self.first_failure and not isinstance(error, KeyboardInterrupt):
                failure = f"{type(error).__name__}: {error}"
                self.first_failure = f"first failure: in example {self.examples}, after {self.steps} steps: {failure}"
                self.failing = list(steps)
                if self._prints:
                    print(self.first_failure[:2000], flush=True)
            raise

    def note_state(self, contents: Contents, model: Model) -> None:
        """Count an abstract state: how many (none, one, more) of each kind of thing there are."""
        states = Counter(entry.state for kept in contents.entries.values() for entry in kept)
        outcomes = Counter(one.outcome for one in contents.stored.outcomes.values())
        queued = contents.queued
        counts = [states[name] for name in ("pending", "sent", "stored", "rejected")]
        counts += [outcomes[name] for name in ("duplicate", "rejected", "discarded")]
        counts.append(len(contents.stored.withdrawn))
        counts += [len(contents.stored.rows), len(queued.waiting), len(queued.started), len(queued.failed)]
        counts += [sum(map(len, queued.reserved.values())), len(queued.acknowledged), len(model.lost)]
        self._states.add((len(contents.entries), model.disturbed, *(min(count, 2) for count in counts)))

    def summary(self) -> str:
        seconds = time.perf_counter() - self._began
        return (
            f"{self.examples} examples, {self.steps} steps in {seconds:.0f} s ({self.steps / seconds:.0f}/s),"
            f" {self.faults} faults, {len(self._states)} distinct states"
        )

    def lines(self) -> list[str]:
        return [
            self.summary(),
            *(f"{count:8} {name}" for name, count in self.actions.most_common()),
        ]
