"""The examples and tables of the documents in `producers` for authors of controllers and of other programs."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis

from producers import acknowledgements, current_signals, errors, events, json_values, outbox
from producers.errors import EventRejected, HistoryError, InvalidEvent, OutboxError
from producers.events import PortfolioSnapshotEvent, decode, encode, event_id
from producers.settings import TransportSettings
from producers.testing import FakeHistory
from tests.documents import block, table, text_of


def test_the_examples_for_a_controller_run_one_after_the_other() -> None:
    """The second snapshot is a duplicate of the first."""
    examples = (
        block("producers/README.md", "record"),
        block("producers/README.md", "errors"),
        block("producers/README.md", "receipt"),
        block("producers/README.md", "producer"),
    )
    namespace: dict[str, Any] = {}
    with FakeHistory() as history, history.worker():
        for example in examples:
            exec(example, namespace)
        # In a thread: the browser of other tests leaves an event loop running in the main thread.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(exec, block("producers/README.md", "asyncio"), namespace).result()
        assert [one.portfolio_id for one in history.snapshots] == [1, 1, 2, 3]
        assert [one.portfolio_id for one in history.archives] == [1, 2]
    assert namespace["row_id"] == 3


def _raise(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (InvalidEvent("balance: must be a number"), "correct the input: balance: must be a number"),
        (OutboxError("disk full"), "the disk is full or not writable, record again later: disk full"),
    ],
)
def test_the_example_of_errors_handles_them(error: Exception, logged: str, caplog: pytest.LogCaptureFixture) -> None:
    call = {"create_daily_portfolio_snapshot": _raise(error), "portfolio": {}, "cycle_time": None}
    exec(block("producers/README.md", "errors"), call)
    assert caplog.messages == [logged]


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (EventRejected("id", "balance: too large"), "not stored: balance: too large"),
        (TimeoutError(), "not stored yet; the outbox keeps it and the relay continues"),
    ],
)
def test_the_example_of_a_receipt_handles_its_errors(
    error: Exception, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    receipt = SimpleNamespace(wait=_raise(error))
    exec(block("producers/README.md", "receipt"), {"receipt": receipt, "log": logging.getLogger("bot")})
    assert caplog.messages == [logged]


def test_each_error_of_the_table_is_a_history_error() -> None:
    """And so are all other errors of the package."""
    names = {name for row in table("producers/README.md", "table of errors") for name in re.findall(r"`(\w+)`", row[0])}
    assert {"InvalidEvent", "OutboxError", "SettingsError"} < names
    assert names <= vars(errors).keys()
    classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)]
    assert all(issubclass(one, HistoryError) for one in classes)


def test_the_limits_in_the_documents_are_those_of_the_code() -> None:
    """Each is written once, with its unit."""
    for document, limits in {
        "producers/README.md": (
            f"for at most {current_signals.URL_TIMEOUT_SECONDS:.0f} s)",
            f"larger than {outbox.MAX_BYTES / 2**31} GiB (its limit is {outbox.MAX_BYTES / 2**30:.0f} GiB)",
        ),
        "producers/EVENTS.md": (
            f"more than {json_values.MAX_NESTING} levels of nesting",
            f"more than {json_values.MAX_SIGNALS:,} signals",
            f"events over {events.MAX_EVENT_BYTES // 2**20} MiB",
            f"more than {events.MAX_EVENT_STRUCTURE:,} brackets, colons and commas",
            f"expires {acknowledgements.ACKNOWLEDGEMENT_TTL_SECONDS // 86400} days after",
        ),
    }.items():
        text = " ".join(text_of(document).split())
        assert [limit for limit in limits if text.count(limit) != 1] == []


def test_the_table_of_settings_has_the_variables_and_defaults_of_a_controller() -> None:
    """A default in code style is the value; another one describes None."""
    documented = {variable.strip("`"): default for variable, default, _ in table("producers/README.md", "settings")}
    defaults = {str(field.alias): field.default for field in TransportSettings.model_fields.values()}
    assert documented.keys() == defaults.keys()
    for variable, default in defaults.items():
        shown = re.fullmatch("`(.*)`", documented[variable])
        assert (shown and type(default)(shown[1])) == default


def test_the_example_test_of_a_controller_passes(tmp_path: Path) -> None:
    """The fixture is available in any environment that has the package."""
    (tmp_path / "test_bot.py").write_text(block("producers/TESTING.md", "test_bot.py"), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (run.returncode, "3 passed" in run.stdout) == (0, True), run.stdout


def test_the_example_without_pytest_runs() -> None:
    exec(block("producers/TESTING.md", "without pytest"), {})


def test_the_table_of_the_fixture_has_all_its_public_attributes() -> None:
    cells = " ".join(row[0] for row in table("producers/TESTING.md", "fixture"))
    public = {name for name in dir(FakeHistory()) if not name.startswith("_")}
    assert set(re.findall(r"`(\w+)", cells)) == public


def test_the_example_of_an_event_encodes_to_the_same_text() -> None:
    text = block("producers/EVENTS.md", "wire").strip()
    assert encode(decode(text, PortfolioSnapshotEvent)) == text


def test_the_test_vectors_of_event_ids_hold() -> None:
    """Both for the project's own function and for the one that the document shows."""
    namespace: dict[str, Any] = {}
    exec(block("producers/EVENTS.md", "event id"), namespace)
    vectors = [[cell.strip("`") for cell in row] for row in table("producers/EVENTS.md", "test vectors")]
    assert len(vectors) == 4
    for event_type, portfolio, instant, expected in vectors:
        arguments = (event_type, None if portfolio == "none" else int(portfolio), datetime.fromisoformat(instant))
        assert (str(event_id(*arguments)), str(namespace["event_id"](*arguments))) == (expected, expected)


def test_another_program_enqueues_an_event_and_reads_its_acknowledgement(
    redis: Redis, database_url: str, work: Callable[[], None]
) -> None:
    """The event of the example becomes the first row."""
    text = block("producers/EVENTS.md", "wire").strip()
    event = decode(text, PortfolioSnapshotEvent)
    namespace: dict[str, Any] = {"redis": redis, "text": text, "source": event.source}
    exec(block("producers/EVENTS.md", "enqueue"), namespace)
    assert namespace["job"].failure_ttl == -1  # a rejected event stays until an operator has seen it
    work()
    exec(block("producers/EVENTS.md", "acknowledgement"), namespace)
    assert (namespace["event_id_or_dash"], namespace["outcome"]) == (str(event.id), "stored:1")
    assert int(namespace["time"]) > 0
