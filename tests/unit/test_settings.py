"""Settings: environment over .env, errors that name the variable and never show its value."""

from __future__ import annotations

from pathlib import Path

import pytest

from consumers.settings import StoreSettings
from consumers.stack import stack
from producers.errors import SettingsError
from producers.settings import TransportSettings


def test_defaults_are_those_of_the_documentation() -> None:
    """Nothing set: queue history, outbox data/outbox.db, the machine's zone, no Redis."""
    settings = TransportSettings.from_environment()
    assert (settings.queue, settings.outbox, settings.timezone, settings.redis_url) == (
        "history",
        Path("data/outbox.db"),
        None,
        None,
    )


def test_the_environment_goes_before_the_file_and_empty_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A .env in the working folder is read; other programs' variables in it are ignored."""
    Path(".env").write_text("HISTORY_QUEUE=from-file\nHISTORY_OUTBOX=from-file.db\nUNRELATED=1\n")
    monkeypatch.setenv("HISTORY_QUEUE", "from-environment")
    monkeypatch.setenv("HISTORY_TIMEZONE", "")
    settings = TransportSettings.from_environment()
    assert (settings.queue, settings.outbox, settings.timezone) == ("from-environment", Path("from-file.db"), None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HISTORY_TIMEZONE", "Middle/Earth"),
        ("HISTORY_TIMEZONE", "../../etc/passwd"),
        ("HISTORY_QUEUE", "two queues"),
    ],
)
def test_a_wrong_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """The message begins with the variable."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=rf"^{name}: ") as caught:
        TransportSettings.from_environment()
    assert value not in str(caught.value)


def test_a_redis_url_that_cannot_be_read_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the error nor in what the settings print."""
    monkeypatch.setenv("REDIS_URL", "amqp://user:s3cret@host")
    settings = TransportSettings.from_environment()
    with pytest.raises(SettingsError, match="^REDIS_URL: must be") as caught:
        settings.redis()
    assert "s3cret" not in str(caught.value) + repr(settings)


def test_the_database_is_named_by_url_or_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are percent-encoded, so that a password may hold any character; the URL goes before them."""
    for name, value in {"HOST": "db", "PORT": "6432", "DB": "bot", "USER": "me", "PASSWORD": "p@ss/w:rd"}.items():
        monkeypatch.setenv(f"POSTGRES_{name}", value)
    settings = StoreSettings.from_environment()
    assert settings.url().get_secret_value() == "postgresql://me:p%40ss%2Fw%3Ard@db:6432/bot"
    assert "p@ss" not in repr(settings)
    for name in ("HOST", "PORT", "DB", "USER"):
        monkeypatch.delenv(f"POSTGRES_{name}")
    assert StoreSettings.from_environment().url().get_secret_value() == (
        "postgresql://trading_history:p%40ss%2Fw%3Ard@localhost:5432/trading_history"
    )
    monkeypatch.setenv("DATABASE_URL", "postgresql://x@y/z")
    assert StoreSettings.from_environment().url().get_secret_value() == "postgresql://x@y/z"


def test_a_host_may_be_the_folder_of_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for libpq."""
    monkeypatch.setenv("POSTGRES_HOST", "/var/run/postgresql")
    assert StoreSettings.from_environment().url().get_secret_value() == (
        "postgresql://trading_history@:5432/trading_history?host=%2Fvar%2Frun%2Fpostgresql"
    )


def test_without_a_database_the_error_names_the_setting() -> None:
    """For a command or a worker that needs one."""
    with pytest.raises(SettingsError, match="^DATABASE_URL is not set"):
        StoreSettings.from_environment().url()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DATABASE_URL", "postgresql://h/d", "^the database is set but REDIS_URL is not"),
        ("POSTGRES_PASSWORD", "secret", "^the database is set but REDIS_URL is not"),
        ("REDIS_URL", "redis://h", "^REDIS_URL is set but DATABASE_URL"),
    ],
)
def test_one_server_without_the_other_is_an_error_not_a_fallback(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """A command that needs both never starts embedded servers beside a configured one."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message), stack(database=True, redis=True):
        pass
