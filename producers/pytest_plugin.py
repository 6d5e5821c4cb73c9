"""The fixture `trading_history`, known to pytest wherever this package is installed.

Every run of pytest there imports this module, so it imports nothing else before a test asks for the fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from producers.testing import FakeHistory


@pytest.fixture
def trading_history(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHistory]:
    """A `producers.testing.FakeHistory`: everything that the test records goes there, and nothing to a server."""
    try:
        from producers.fake_transport import VARIABLES
        from producers.testing import FakeHistory
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}: pip install '.[testing]' in a clone of trading-history", pytrace=False)
    # A test that changes one of these has monkeypatch put back what it found, which is the fake's; so monkeypatch, the
    # last to undo, must have seen them before.
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    with FakeHistory() as history:
        yield history
