from tests.integration.test_doctor import *  # noqa: F403  # every test of it
