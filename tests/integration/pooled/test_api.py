from tests.integration.test_api import *  # noqa: F403  # every test of it
