"""The fixture `trading_history`, known to pytest wherever this package is installed.

Every run of pytest there imports this module, so it imports nothing else before a test asks for the fixture. It is
installed as `trading_history_pytest` too, for projects with another package `producers`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from producers.testing import FakeHistory


@pytest.fixture
def trading_history(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHistory]:
    """A `producers.testing.FakeHistory`: everything that the test records goes there, and nothing to a server."""
    try:
        from producers.child_environment import VARIABLES
        from producers.testing import FakeHistory
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("producers."):
            pytest.fail(
                f"a package of this project hides the package `producers` of trading-history: {error}", pytrace=False
            )
        pytest.fail(f"{error}: pip install '.[testing]' in a clone of trading-history", pytrace=False)
    # A test that changes one of these has monkeypatch put back what it found, which is the fake's; so monkeypatch, the
    # last to undo, must have seen them before.
    for name in VARIABLES:
        _note(monkeypatch, name)
    with FakeHistory() as history, _redirecting_again(monkeypatch, VARIABLES):
        yield history


def _note(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have monkeypatch restore the variable's present value at its end; nothing changes now."""
    value = os.environ.get(name)
    monkeypatch.setenv(name, value or "")
    if value is None:
        monkeypatch.delenv(name)


@contextmanager
def _redirecting_again(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> Iterator[None]:
    """Keep child processes away from the real Redis after an undo() in the block, too."""
    from unittest.mock import patch

    fakes = {name: os.environ[name] for name in names}
    undo = monkeypatch.undo

    def undo_but_redirect() -> None:
        undo()
        for name, value in fakes.items():
            monkeypatch.setenv(name, value)

    with patch.object(monkeypatch, "undo", undo_but_redirect):
        yield
