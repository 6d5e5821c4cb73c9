from tests.integration.test_reservations import *  # noqa: F403  # every test of it
