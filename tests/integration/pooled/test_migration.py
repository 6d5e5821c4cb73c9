from tests.integration.test_migration import *  # noqa: F403  # every test of it
