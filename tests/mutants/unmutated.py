"""The run of the unmutated tests: how long each test takes, and which lines it executes."""

from __future__ import annotations

import ast
import pickle
import sys
import sysconfig
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.child_run import run_pytest
from tests.mutants.mutant import Mutant

_OUTSIDE = ""
"""Name of the context of lines that are executed outside of tests: when their module is imported."""


@dataclass(frozen=True)
class Unmutated:
    """Facts of the unmutated run.

    Attributes:
        seconds: Duration of each test.
        tests_by_line: For each Python file, the tests that execute a line.
        tests_by_script: For each Lua script that the tests themselves call, the tests that call it.
        modules: Modules of other projects that the tests imported.
    """

    seconds: dict[str, float]
    tests_by_line: dict[str, dict[int, set[str]]]
    tests_by_script: dict[str, set[str]]
    modules: list[str]

    def tests_of(self, mutant: Mutant, text: str) -> set[str]:
        """Return the tests that execute the changed line of `text`, the unchanged file.

        A line that is executed when the module is imported, or whose result is cached, counts as executed by all tests
        that run a function of the module. Another file counts as executed by all tests, except if it is a Lua script: a
        test that calls scripts does not execute the others. A test that calls none may start a process that does.
        """
        lines = self.tests_by_line.get(mutant.path)
        if lines is None:
            others = set().union(*self.tests_by_script.values()) - self.tests_by_script.get(mutant.path, set())
            return set(self.seconds) - others
        first, last, is_cached = _statement(text, mutant.line)
        found = set().union(*(lines.get(line, ()) for line in range(first, last + 1)))
        if _OUTSIDE in found or (found and is_cached):
            return set().union(*lines.values()) - {_OUTSIDE} or set(self.seconds)
        return found


def _statement(text: str, line: int) -> tuple[int, int, bool]:
    """First and last line of the innermost statement with this line, and whether a cache keeps its result.

    Of a statement that contains others, such as `if`, this is the part before them.
    """
    first = last = line
    is_cached = False
    for node in ast.walk(ast.parse(text)):  # from the outermost to the innermost
        if not isinstance(node, ast.stmt) or not node.lineno <= line <= (node.end_lineno or 0):
            continue
        if isinstance(node, ast.FunctionDef):
            is_cached = any("cache" in ast.unparse(one) for one in node.decorator_list)
        inner = [one.lineno for one in ast.walk(node) if isinstance(one, ast.stmt) and one is not node]
        end = node.end_lineno or line
        if not inner or line < min(inner):
            first, last = node.lineno, min([end, *(number - 1 for number in inner)])
    return first, max(first, last), is_cached


class _Recorder:
    """Plugin that records the duration of each test, and names it to coverage.py."""

    def __init__(self, tree: Path, files: Sequence[str], result: Path) -> None:
        self._tree, self._files, self._result = tree, files, result
        self._seconds: dict[str, float] = {}
        self._scripts: dict[str, set[str]] = {}
        self._test = _OUTSIDE

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_parse(self) -> None:
        """Start before the first import of the project."""
        import coverage

        include = [str(self._tree / file) for file in self._files]
        self._coverage = coverage.Coverage(data_file=None, config_file=False, include=include)
        self._coverage.set_option("run:disable_warnings", ["no-data-collected"])  # no file may be Python
        self._coverage.start()
        self._watch_scripts()

    def _watch_scripts(self) -> None:
        from redis.commands.core import Script

        texts = {file: (self._tree / file).read_text("utf-8") for file in self._files if file.endswith(".lua")}
        call = Script.__call__

        def noted(script: Script, *args: Any, **keywords: Any) -> Any:
            for file, text in texts.items():
                if text in str(script.script):
                    self._scripts.setdefault(file, set()).add(self._test)
            return call(script, *args, **keywords)

        Script.__call__ = noted  # type: ignore[assignment, method-assign]  # in this process only

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._coverage.switch_context(item.nodeid)
        self._test = item.nodeid
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            self._seconds[item.nodeid] = time.perf_counter() - start
            self._coverage.switch_context(_OUTSIDE)

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        lines = {
            file: {line: set(tests) for line, tests in data.contexts_by_lineno(str(self._tree / file)).items()}
            for file in self._files
            if file.endswith(".py")
        }
        self._result.write_bytes(pickle.dumps((self._seconds, lines, self._scripts, _modules_of_others(self._tree))))


def _modules_of_others(tree: Path) -> list[str]:
    installed = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib"))
    return [
        name
        for name, module in list(sys.modules.items())
        if str(getattr(module, "__file__", None) or "").startswith(installed) and not name.startswith("coverage")
    ]


def run_unmutated(tree: Path, files: Sequence[str], tests: Sequence[str], plugins: Sequence[object]) -> Unmutated:
    """Run the tests of a target on the unchanged tree.

    Raises:
        SystemExit: a test fails.
    """
    result = tree.parent / "unmutated.pickle"
    run = run_pytest(tree, tests, [_Recorder(tree, files, result), *plugins], lambda test: 300, ["-x"])
    if run.exit_code != 0:
        output = (tree.parent / "output.txt").read_text("utf-8", "replace")
        raise SystemExit(
            f"{output[-5000:]}\nthe unmutated tests must pass first; pytest's exit code is {run.exit_code}"
        )
    return Unmutated(*pickle.loads(result.read_bytes()))
