from tests.integration.test_audit import *  # noqa: F403  # every test of it
