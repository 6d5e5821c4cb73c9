from tests.integration.test_sessions import *  # noqa: F403  # every test of it
