from tests.integration.test_completion_script import *  # noqa: F403  # every test of it
