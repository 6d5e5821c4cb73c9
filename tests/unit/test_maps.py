"""The maps in the READMEs of `consumers` and of the worker, compared with the code."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from producers import redis_keys

ROOT = Path(__file__).parents[2]
MAP = (ROOT / "consumers/README.md").read_text("utf-8")
WORKER = (ROOT / "consumers/worker/README.md").read_text("utf-8")


def _block(document: str, name: str) -> list[str]:
    """The lines of the code block after the comment with this name."""
    (lines,) = re.findall(rf"<!-- {re.escape(name)} -->\n```\n(.*?)```\n", document, re.DOTALL)
    return str(lines).splitlines()


def _table(document: str, name: str) -> list[list[str]]:
    """The cells of the table after the comment with this name, without its head."""
    (lines,) = re.findall(rf"<!-- {re.escape(name)} -->\n((?:\|.*\n)+)", document)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in str(lines).splitlines()[2:]]


def _modules() -> list[str]:
    found = [file for package in ("producers", "consumers") for file in (ROOT / package).rglob("*.*")]
    return [
        str(file.relative_to(ROOT)) for file in found if file.suffix in {".py", ".lua"} and file.name != "__init__.py"
    ]


def _modules_in_the_tree() -> Iterator[str]:
    folders: list[str] = []
    for line in _block(MAP, "tree"):
        found = re.fullmatch(r"(?P<indent> *)(?P<name>\S+?)(?P<folder>/?) {2,}(?P<text>\S.*)", line)
        assert found, f"neither a folder nor a module with a description: {line}"
        del folders[len(found["indent"]) // 2 :]
        if found["folder"]:
            folders.append(found["name"])
        else:
            yield "/".join([*folders, found["name"]])


def test_the_tree_has_each_module_once() -> None:
    assert sorted(_modules_in_the_tree()) == sorted(_modules())


@pytest.mark.parametrize("container", ["consumers", "consumers.worker"])
def test_the_picture_has_the_layers_that_import_linter_checks(container: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one.get("containers") == [container])
    shown = [re.match(r"\| (.*?) \|", line) for line in _block(MAP, f"layers of {container}")]
    assert [found[1].split() for found in shown if found] == [layer.split(" | ") for layer in contract["layers"]]


def _module(name: str) -> ModuleType:
    """The module of this file name; no two have one, but for those that the map excepts."""
    (path,) = (path for path in _modules() if path.endswith(f"/{name}.py") and not path.startswith("consumers/cli/"))
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))


def _names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


HOPS = _table(WORKER, "hops")


def _found(name: str) -> Any:
    """The function or class that is named `module.function`."""
    module, *attributes = name.split(".")
    assert attributes, f"{name} is a module, not a function or class in one"
    found: Any = _module(module)
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


@pytest.mark.parametrize("name", sorted({name for hop in HOPS for cell in hop for name in _names(cell)}))
def test_each_name_in_the_table_of_hops_exists(name: str) -> None:
    if name.endswith(".lua"):
        assert f"consumers/worker/scripts/{name}" in _modules()
    else:
        assert _found(name)


# The first caller is the controller.
@pytest.mark.parametrize(("caller", "called"), [_names(" ".join(hop[:2])) for hop in HOPS[1:]])
def test_the_module_of_each_caller_calls_the_function(caller: str, called: str) -> None:
    module, (name, *method) = _module(caller.split(".", maxsplit=1)[0]), called.split(".")[1:]
    if method:
        assert f".{method[0]}(" in inspect.getsource(module)
    else:
        assert getattr(module, name) is _found(called)


def test_the_table_of_redis_keys_is_complete() -> None:
    made = {
        function(*(f"<{parameter}>" for parameter in inspect.signature(function).parameters))
        for name, function in inspect.getmembers(redis_keys, inspect.isfunction)
        if name.endswith("_key")
    }
    rows = _table(WORKER, "keys")
    assert {name for row in rows for name in _names(row[0])} == made
    assert len(rows) == len(made)
