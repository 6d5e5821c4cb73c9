from tests.integration.test_csv import *  # noqa: F403  # every test of it
