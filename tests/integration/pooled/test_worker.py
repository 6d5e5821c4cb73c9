import pytest

from tests.integration.test_worker import *  # noqa: F403  # every test of it

pytestmark = pytest.mark.usefixtures("database_url")
