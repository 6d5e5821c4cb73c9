import pytest

from tests.integration.test_worker_control import (  # noqa: F401  # collected here
    test_a_suspended_worker_takes_no_job_until_it_is_resumed,
    test_the_shutdown_command_ends_an_idle_worker,
)

pytestmark = pytest.mark.usefixtures("database_url")
