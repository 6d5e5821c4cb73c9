from tests.integration.test_schema import *  # noqa: F403  # every test of it
