from tests.integration.test_export import *  # noqa: F403  # every test of it
