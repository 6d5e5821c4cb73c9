"""The state machine of the delivery, for some seconds: see tests/property/delivery."""

from __future__ import annotations

from redis import Redis

from tests.documents import ROOT
from tests.property.delivery.defects import DEFECTS
from tests.property.delivery.runs import new_world, run, settings_of
from tests.property.delivery.statistics import Statistics


def test_every_accepted_event_becomes_one_row_or_one_recorded_outcome(redis: Redis, database_url: str) -> None:
    statistics = Statistics()
    with new_world(redis, database_url) as world:
        run(world, settings_of(20, 30, derandomize=True), statistics)
    assert statistics.steps > 200


def test_each_known_defect_still_fits_the_source() -> None:
    for change in (change for defect in DEFECTS.values() for change in defect.changes):
        assert (ROOT / change.file).read_text("utf-8").count(change.right) == 1, change
