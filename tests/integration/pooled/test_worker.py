import pytest

from tests.integration.test_worker import *  # noqa: F403  # every test of it

pytestmark = pytest.mark.usefixtures("database_url")
# pgbouncer keeps its connections: a changed default of the database reaches new ones only.
del test_a_database_that_was_read_only_is_used_again  # noqa: F821  # imported above
