from tests.integration.test_moving_rows import *  # noqa: F403  # every test of it
