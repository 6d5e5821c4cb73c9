from tests.integration.test_adopt_legacy import *  # noqa: F403  # every test of it
