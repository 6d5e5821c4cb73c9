from tests.integration.test_read_plans import *  # noqa: F403  # every test of it
