"""Runs of the machine: short in the gate, long by name."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from redis import Redis

from tests.property.delivery.machine import DeliveryMachine
from tests.property.delivery.shrinking import print_shrunk
from tests.property.delivery.statistics import Statistics
from tests.property.delivery.world import World, a_world

# Outboxes and servers need no disk here. None: this machine has no file system in memory.
RAM_FOLDER = folder if (folder := Path("/dev/shm")).is_dir() else None


@contextmanager
def new_world(redis: Redis, database_url: str) -> Iterator[World]:
    """Make a world on these servers, with outboxes in memory if the machine has a file system there."""
    with (
        TemporaryDirectory(prefix="th-", dir=RAM_FOLDER) as folder,
        a_world(Path(folder), redis, database_url) as world,
    ):
        yield world


def settings_of(examples: int, steps: int, *, derandomize: bool = False) -> settings:
    """Return the settings of a run. A seed repeats it, and `shrinking` makes a failing run shorter."""
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
        report_multiple_bugs=False,
    )


def run(
    world: World, chosen: settings, statistics: Statistics, seed: int | None = None, *, shrinks: bool = True
) -> None:
    """Run the machine. A run that breaks the model is shrunk, printed, and raised."""

    def machine() -> DeliveryMachine:
        return DeliveryMachine(world, statistics)

    if seed is not None:
        machine = hypothesis.seed(seed)(machine)
    gc.collect()
    try:
        run_state_machine_as_test(machine, settings=chosen)  # type: ignore[arg-type]  # it takes any callable
    except BaseException:
        if shrinks and statistics.failing:
            print_shrunk(world, statistics.failing)
        raise
