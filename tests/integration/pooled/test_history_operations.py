from tests.test_history_operations import *  # noqa: F403  # every test of it
