"""Run the tests of a target against its mutants: each one in a forked child, on a copy of the project."""

from __future__ import annotations

import gc
import importlib
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import pytest

from tests.mutants.child_run import run_pytest
from tests.mutants.mutant import Mutant, line_text
from tests.mutants.servers import Servers, running_servers
from tests.mutants.targets import Target
from tests.mutants.tree import copy_tree, mutated
from tests.mutants.unmutated import Unmutated, run_unmutated

_SCHEMA = "schema.sql"
_UNCHANGED = "nothing"
_NO_TEST_RAN = {pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR}

Verdict = Literal["killed", "timeout", "survived", "not reached", "broken"]


@dataclass(frozen=True)
class Result:
    """Result of the tests with a mutant.

    Attributes:
        verdict: `killed`: a test failed. `timeout`: a test took too long, which counts as killed. `survived`: all tests
            that execute the line passed. `not reached`: no test executes the line. `broken`: Python cannot compile it.
        line_text: The unchanged line, as `line_text` returns it.
        test: The test that failed.
    """

    mutant: Mutant
    verdict: Verdict
    line_text: str
    seconds: float
    test: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Path, line and change: by them an explanation names the mutant."""
        return self.mutant.path, self.line_text, self.mutant.change


class _Selection:
    """Plugin that runs the given tests, in their order. Tests that only the mutant has run last."""

    def __init__(self, tests: Sequence[str], known: dict[str, float]) -> None:
        self._places = {test: place for place, test in enumerate(tests)}
        self._known = known

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if item.nodeid in self._places or item.nodeid not in self._known]
        items[:] = sorted(kept, key=lambda item: self._places.get(item.nodeid, len(self._places)))


def files_of(target: Target, root: Path) -> list[str]:
    """Return the paths of the files that the target mutates."""
    found = sorted(str(path.relative_to(root)) for pattern in target.files for path in root.glob(pattern))
    return [path for path in dict.fromkeys(found) if not any(fnmatch(path, pattern) for pattern in target.but)]


def mutants_of(target: Target, root: Path) -> list[Mutant]:
    """Return all mutants of the target's files."""
    return [
        mutant
        for path in files_of(target, root)
        for mutant in target.mutants_of(path, (root / path).read_text("utf-8"))
    ]


class Runner:
    """Runs the tests of a target against mutants, in one copy of the project."""

    def __init__(self, target: Target, tree: Path, unmutated: Unmutated, servers: Servers | None) -> None:
        self._target, self._tree, self._unmutated, self._servers = target, tree, unmutated, servers
        self._kills: Counter[str] = Counter()

    def check(self, path: str) -> None:
        """Run all tests without a change, in the order and the way in which they run against a mutant.

        Raises:
            SystemExit: a test fails.
        """
        verdict, test = self._verdict(Mutant(path, 1, _UNCHANGED, self._text(path)), set(self._unmutated.seconds))
        if verdict != "survived":
            raise SystemExit(f"without a change, but in the order of the mutants, a test fails ({verdict}): {test}")

    def run(self, mutant: Mutant) -> Result:
        start, text = time.monotonic(), self._text(mutant.path)
        tests = self._unmutated.tests_of(mutant, text)
        verdict: Verdict
        if mutant.path.endswith(".py") and not _compiles(mutant.text):
            verdict, test = "broken", None
        elif not tests:
            verdict, test = "not reached", None
        else:
            verdict, test = self._verdict(mutant, tests)
        return Result(mutant, verdict, line_text(text, mutant.line), time.monotonic() - start, test)

    def _most_seconds(self, test: str) -> float:
        return self._target.test_seconds + 5 * self._unmutated.seconds.get(test, 1.0)

    def _text(self, path: str) -> str:
        return (self._tree / path).read_text("utf-8")

    def _verdict(self, mutant: Mutant, tests: set[str]) -> tuple[Verdict, str | None]:
        seconds = self._unmutated.seconds
        ordered = sorted(tests, key=lambda test: (-self._kills[test], seconds[test], test))
        plugins: list[object] = [_Selection(ordered, seconds)]
        if self._servers:
            self._servers.renews_template |= mutant.path == _SCHEMA
            plugins.append(self._servers)
        arguments = self._target.arguments({test.partition("::")[0] for test in ordered})
        with mutated(self._tree, mutant):
            run = run_pytest(self._tree, arguments, plugins, self._most_seconds, ["-x"])
        if self._servers:
            self._servers.renews_template = mutant.path == _SCHEMA
            if run.exit_code is None:
                self._servers.restart()
        if run.test:
            self._kills[run.test] += 1
        if run.exit_code is None:
            return "timeout", run.test
        if run.exit_code in _NO_TEST_RAN and run.test is None and mutant.change != _UNCHANGED:
            self.check(mutant.path)  # otherwise a full disk, for example, would count as a test that failed
        is_passed = run.exit_code in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
        return ("survived" if is_passed else "killed"), run.test


def _compiles(text: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(text, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def run_target(
    target: Target, mutants: Sequence[Mutant], root: Path, processes: int, report: Callable[[Result], None]
) -> list[Result]:
    """Run all these mutants; `report` is called with each result, in a child process.

    Raises:
        SystemExit: the unmutated tests fail.
    """
    with _prepared(target, root) as (tree, servers):
        plugins = [servers] if servers else []
        unmutated = run_unmutated(tree, files_of(target, root), target.arguments(), plugins)
    _import(unmutated.modules)
    gc.freeze()  # pytest collects garbage in each child, which would look at all these modules again
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        parts = [mutants[number::processes] for number in range(processes)]
        runs = [pool.submit(_run_part, target, part, root, unmutated, report) for part in parts]
        return [result for run in runs for result in run.result()]


def _run_part(
    target: Target, mutants: Sequence[Mutant], root: Path, unmutated: Unmutated, report: Callable[[Result], None]
) -> list[Result]:
    results = []
    with _prepared(target, root) as (tree, servers):
        runner = Runner(target, tree, unmutated, servers)
        runner.check(files_of(target, root)[0])
        for mutant in mutants:
            results.append(runner.run(mutant))
            report(results[-1])
    return results


@contextmanager
def _prepared(target: Target, root: Path) -> Iterator[tuple[Path, Servers | None]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True)))
        tree = copy_tree(root, folder)
        yield tree, stack.enter_context(running_servers(tree)) if target.needs_servers else None


def _import(modules: Sequence[str]) -> None:
    """Import what the tests need beside the project, once, so that no child has to."""
    for name in modules:
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            importlib.import_module(name)
