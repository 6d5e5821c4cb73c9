from tests.integration.test_failed import *  # noqa: F403  # every test of it
