"""Tables and maps in the documents of `consumers` and of the worker, compared with the code."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from consumers.db import inserts
from consumers.settings import (
    ApiSettings,
    DashboardSettings,
    EmbeddedSettings,
    LoginSettings,
    LogSettings,
    MetricsSettings,
    PingSettings,
    StoreSettings,
)
from consumers.worker import (
    batch,
    completion,
    deliveries,
    history_worker,
    maintenance,
    orphans,
    reservations,
    worker_thread,
)
from producers import entry_sender, outbox_header, redis_keys
from producers.settings import TransportSettings
from tests.documents import block, table, text_of, words

ROOT = Path(__file__).parents[2]
_MOST_TERMS = 25
_MOST_WORDS_OF_THE_MAP = 400
_SETTINGS = (
    *(TransportSettings, StoreSettings, LoginSettings, EmbeddedSettings, ApiSettings, DashboardSettings),
    *(MetricsSettings, LogSettings, PingSettings),
)


def _names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _modules() -> list[str]:
    found = [file for package in ("producers", "consumers") for file in (ROOT / package).rglob("*.*")]
    return [
        str(file.relative_to(ROOT).with_suffix(""))
        for file in found
        if file.suffix in {".py", ".lua"} and file.name != "__init__.py"
    ]


def test_the_map_names_each_module_once() -> None:
    """In the row of its folder, without its suffix."""
    rows = table("consumers/README.md", "map")
    assert sorted(f"{_names(folder)[0]}/{name}" for folder, _, names in rows for name in _names(names)) == sorted(
        _modules()
    )
    assert sum(words(" ".join(row)) for row in rows) <= _MOST_WORDS_OF_THE_MAP


def test_the_glossary_defines_each_term_once_in_at_most_two_sentences() -> None:
    """It has at most 25 rows. The second sentence defines terms of the same kind, in italics."""
    rows = table("consumers/README.md", "glossary")
    terms = [term for row in rows for term in row[0].split(", ")]
    assert len(rows) <= _MOST_TERMS
    assert sorted(set(terms)) == sorted(terms)
    assert [meaning for _, meaning in rows if not meaning.endswith(".") or meaning.count(". ") > 1] == []


_LAYERS = {
    "consumers": block("consumers/README.md", "layers of consumers"),
    "consumers.worker": block("consumers/README.md", "layers of consumers.worker"),
}


@pytest.mark.parametrize("container", _LAYERS)
def test_the_layers_of_the_document_are_those_that_import_linter_checks(container: str) -> None:
    """From top to bottom, with the neighbours of each layer."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one.get("containers") == [container])
    assert _LAYERS[container].splitlines() == contract["layers"]


def test_the_table_of_settings_has_each_setting_with_its_default() -> None:
    """A setting that needs no value has the default none."""
    rows = table("consumers/SETTINGS.md", "settings")
    documented = {_names(name)[0]: default.strip("`") for name, default, _ in rows}
    defaults = {field.alias: field.default for model in _SETTINGS for field in model.model_fields.values()}
    written = {
        name: str(int(default) if isinstance(default, bool) else default).removesuffix(".0")
        for name, default in defaults.items()
    }
    assert documented == {name: "none" if value in ("None", "()") else value for name, value in written.items()}


def _module(name: str) -> ModuleType:
    """Import the module of this file name, which is unique outside of `consumers/cli`."""
    (path,) = (path for path in _modules() if path.endswith(f"/{name}") and not path.startswith("consumers/cli/"))
    return importlib.import_module(path.replace("/", "."))


HOPS = table("consumers/worker/README.md", "hops")


def _found(name: str) -> Any:
    """Return the function or class that is named `module.function`."""
    module, *attributes = name.split(".")
    assert attributes, f"{name} is a module, not a function or class in one"
    found: Any = _module(module)
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


@pytest.mark.parametrize("name", sorted({name for hop in HOPS for cell in hop for name in _names(cell)}))
def test_each_name_in_the_table_of_hops_exists(name: str) -> None:
    """A script, or a function or class in a module."""
    if name.endswith(".lua"):
        assert f"consumers/worker/scripts/{name.removesuffix('.lua')}" in _modules()
    else:
        assert _found(name)


# The first caller is the controller.
@pytest.mark.parametrize(("caller", "called"), [_names(" ".join(hop[:2])) for hop in HOPS[1:]])
def test_the_module_of_each_caller_calls_the_function(caller: str, called: str) -> None:
    """A method by its name, any other function by the same object."""
    module, (name, *method) = _module(caller.split(".", maxsplit=1)[0]), called.split(".")[1:]
    if method:
        assert f".{method[0]}(" in inspect.getsource(module)
    else:
        assert getattr(module, name) is _found(called)


def test_the_documented_limits_of_the_worker_are_those_of_the_code() -> None:
    """Each is written once, with its unit."""
    for document, limits in {
        "consumers/worker/README.md": (
            f"guarded by a lease of {reservations.LEASE_SECONDS} s",
            f"renews both leases every {history_worker._RENEW_SECONDS:.0f} s",
            f"no progress for {history_worker._STUCK_SECONDS:.0f} s",
            f"up to {worker_thread.BATCH_JOBS} or {reservations._MAX_BATCH_BYTES // 2**20} MiB",
            f"A statement may take {history_worker.STATEMENT_SECONDS:.0f} s, and {batch.ISOLATED_SECONDS:.0f} s while",
            f"after {worker_thread._FIRST_BACKOFF_SECONDS} s to {worker_thread._LAST_BACKOFF_SECONDS:.0f} s",
            f"Every {maintenance._PAUSE_SECONDS:.0f} s each worker renews",
            f"in the intermediate list (for {orphans.ORPHAN_SECONDS:.0f} s)",
            f"{completion.KEPT_OF_A_BATCH} finished jobs of a batch are kept, {completion.KEPT_FINISHED_JOBS:,} in all",
        ),
        "consumers/ops/FAILURES.md": (
            f"After {history_worker._ANSWER_SECONDS:.0f} s a worker drops the connection",
            f"PostgreSQL ends its open insert after {inserts.IDLE_SECONDS:.0f} s",
            f"After {deliveries.POISON_CRASHES} more crashes it is rejected",
            f"After {deliveries.POISON_CRASHES} attempts it is rejected",
            f"About {entry_sender._FULL_QUEUE_JOBS:,} events wait in Redis",
            f"the producers {outbox_header.RELAY_ALIVE_SECONDS:.0f} s after its last heartbeat",
        ),
    }.items():
        text = " ".join(text_of(document).split())
        assert [limit for limit in limits if text.count(limit) != 1] == []


def test_the_table_of_redis_keys_is_complete() -> None:
    """It has each key that producers.redis_keys makes, once."""
    made = {
        function(*(f"<{parameter}>" for parameter in inspect.signature(function).parameters))
        for name, function in inspect.getmembers(redis_keys, inspect.isfunction)
        if name.endswith("_key")
    }
    rows = table("consumers/worker/README.md", "keys")
    assert {name for row in rows for name in _names(row[0])} == made
    assert len(rows) == len(made)
