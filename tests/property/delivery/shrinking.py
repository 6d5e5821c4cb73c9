"""Makes a failing run shorter: leaves out steps, and simplifies the others, as long as it fails in the same way.

Hypothesis shrinks the choices that it made, which needs thousands of attempts: too many for runs that take 0.2 s each.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tests.property.delivery.machine import DeliveryMachine
from tests.property.delivery.statistics import Statistics, Step
from tests.property.delivery.world import World

_ATTEMPTS = 3  # threads may run in another order


def replay(world: World, steps: Sequence[Step]) -> str:
    """Run the steps, without those that cannot do anything now, and the end. Return how it fails, or ""."""
    machine = DeliveryMachine(world, Statistics(prints=False))
    try:
        try:
            for step in steps:
                method = getattr(machine, step.action)
                if getattr(method, "when", lambda _: True)(machine):
                    method(**step.given)
                    machine.check_model()
        except BaseException:
            world.clear()
            raise
        machine.teardown()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def kind_of(failure: str) -> str:
    """Return the beginning of a failure, up to the first value in it."""
    return re.split(r"[0-9{\[(]|: [A-Z]\w+\(", failure)[0]


class Shrinking:
    """The shortest failing run until now."""

    def __init__(self, world: World, steps: Sequence[Step], seconds: float) -> None:
        self._world = world
        self._ends = time.perf_counter() + seconds
        self.steps = list(steps)
        self.failure = next(filter(None, (replay(world, steps) for _ in range(_ATTEMPTS))), "")

    def run(self) -> None:
        """Make the run shorter until nothing helps, or no time is left."""
        before: list[Step] | None = None
        while self.failure and self.steps != before:
            before = self.steps
            size = len(self.steps) // 2
            while size:
                self._leave_out(size)
                size //= 2
            self._simplify()

    def _leave_out(self, size: int) -> None:
        position = 0
        while position < len(self.steps):
            if not self._try([*self.steps[:position], *self.steps[position + size :]]):
                position += size

    def _simplify(self) -> None:
        for position in range(len(self.steps)):
            for name, value in self.steps[position].given.items():
                for simpler in _simpler(name, value):
                    step = self.steps[position]
                    changed = step._replace(given=step.given | {name: simpler})
                    if self._try([*self.steps[:position], changed, *self.steps[position + 1 :]]):
                        break

    def _try(self, steps: list[Step]) -> bool:
        failure = replay(self._world, steps) if time.perf_counter() < self._ends else ""
        if failure and kind_of(failure) == kind_of(self.failure):
            self.steps, self.failure = steps, failure
            return True
        return False


def _simpler(name: str, value: Any) -> Iterator[Any]:
    """Yield simpler values for the argument of an action, the simplest first."""
    if isinstance(value, tuple):  # a fault
        number, when = value
        yield None
        if number > 1:
            yield 1, when
        if number > 2:
            yield number - 1, when
    elif isinstance(value, list):  # events
        yield from ([one] for one in value if len(value) > 1)
    elif isinstance(value, int) and name in ("bot", "worker", "which", "running", "ahead") and value:
        yield type(value)(0)


def print_shrunk(world: World, steps: Sequence[Step], seconds: float = 300) -> None:
    """Print a failing run after it was shrunk for at most this time, as steps for a test."""
    began = time.perf_counter()
    shrinking = Shrinking(world, steps, seconds)
    shrinking.run()
    took = f"{time.perf_counter() - began:.0f} s"
    if shrinking.failure:
        print(f"shrunk from {len(steps)} to {len(shrinking.steps)} steps in {took}: {shrinking.failure[:2000]}")
    else:
        print(f"{len(steps)} steps, which do not fail when they are repeated:")
    print(*shrinking.steps, sep="\n", flush=True)
