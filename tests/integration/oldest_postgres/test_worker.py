import pytest

from tests.integration.test_worker import (  # noqa: F401  # collected here
    test_a_batch_can_have_the_same_event_and_the_same_job_twice,
    test_one_bad_event_in_a_batch_is_rejected_alone,
    test_two_workers_with_the_same_events_in_opposite_order_do_not_deadlock,
    test_without_tables_a_worker_waits_and_then_continues,
)

pytestmark = pytest.mark.usefixtures("database_url")
