from tests.integration.test_status import *  # noqa: F403  # every test of it
