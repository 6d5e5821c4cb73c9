"""The pytest fixture `trading_history`, registered in every environment that has this package.

Each run of pytest in such an environment imports this module, so it imports the rest of the package only when a test
uses the fixture. It is also installed as `trading_history_pytest`, for projects that have another package `producers`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from producers.testing import FakeHistory


@pytest.fixture
def trading_history(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHistory]:
    """An open `producers.testing.FakeHistory`. The FakeHistory receives all events of the test; none
    reaches a server."""
    problem = _another_package()
    if problem is None:
        try:
            from producers.child_environment import VARIABLES
            from producers.testing import FakeHistory
        except ModuleNotFoundError as error:
            problem = f"{error}: pip install '.[testing]' in a clone of trading-history"
    if problem:  # not in the except block, because pytest would show the error above the message
        pytest.fail(problem, pytrace=False)
    # If a test changes one of these with monkeypatch, monkeypatch would restore the fake's value, so it must see the
    # real value first.
    for name in VARIABLES:
        _remember(monkeypatch, name)
    with FakeHistory() as history, _redirecting_again(monkeypatch, VARIABLES):
        yield history


def _another_package() -> str | None:
    """If the name `producers` belongs to a package of another project, return that in one line, and what to do."""
    spec = find_spec("producers")  # without running the package's code
    folders = list(spec.submodule_search_locations or []) if spec else []
    if spec is None or any(Path(folder, "trading_controller.py").is_file() for folder in folders):
        return None
    advice = (
        "move the tests that use the fixture to a folder without this package and without __init__.py,"
        " and run them with `pytest`, not `python -m pytest`"
    )
    place = spec.origin or ", ".join(folders)
    return f"another package named `producers` ({place}) hides the one of trading-history: {advice}"


def _remember(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make monkeypatch restore the present value of the variable when it is undone, without changing it now."""
    value = os.environ.get(name)
    monkeypatch.setenv(name, value or "")
    if value is None:
        monkeypatch.delenv(name)


@contextmanager
def _redirecting_again(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> Iterator[None]:
    """Keep child processes redirected even if the test calls `monkeypatch.undo()` in the block."""
    from unittest.mock import patch

    fakes = {name: os.environ[name] for name in names}
    undo = monkeypatch.undo

    def undo_but_redirect() -> None:
        undo()
        for name, value in fakes.items():
            monkeypatch.setenv(name, value)

    with patch.object(monkeypatch, "undo", undo_but_redirect):
        yield
