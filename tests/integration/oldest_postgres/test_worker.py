import pytest

from tests.integration.test_worker import (  # noqa: F401  # collected here
    test_a_batch_may_have_the_same_fact_and_the_same_job_twice,
    test_one_bad_event_in_a_batch_costs_only_itself,
    test_two_workers_with_the_same_facts_in_opposite_order_do_not_lock_each_other_out,
    test_without_tables_it_waits_and_goes_on_by_itself,
)

pytestmark = pytest.mark.usefixtures("database_url")
