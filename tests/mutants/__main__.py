"""Change one place of the source at a time, and see whether a test fails.

python -m tests.mutants contract --json /tmp/contract.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.mutants.explanations import obsolete, read_explanations
from tests.mutants.mutant import Mutant, line_text
from tests.mutants.running import Result, mutants_of, run_target
from tests.mutants.targets import TARGETS
from tests.mutants.tree import ROOT


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line; `targets` has the names of all targets if none is given."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; by default all")
    parser.add_argument("--json", type=Path, help="append each result to this file, as one line of JSON")
    parser.add_argument("--limit", type=int, help="most mutants of a target: a random sample")
    parser.add_argument("--seed", type=int, default=0, help="repeats a sample")
    parser.add_argument("--processes", type=int, default=1, help="number of mutants at a time")
    parser.add_argument("--file", default="", help="mutate only files whose path contains this text")
    parser.add_argument("--again", type=Path, help="only the mutants that survived according to this file of --json")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target is named {', '.join(unknown)}")
    options.targets = options.targets or list(TARGETS)
    return options


def main() -> int:
    options = parsed()
    results, obsolete_count = [], 0
    for name in options.targets:
        found, count = _run(name, options)
        results += found
        obsolete_count += count
    return int(obsolete_count > 0 or any(_label(one) in _LEFT for one in results))


def _run(name: str, options: argparse.Namespace) -> tuple[list[Result], int]:
    """Run one target and print its report. Returns the results and the number of obsolete explanations."""
    target = TARGETS[name]
    mutants = everything = [one for one in mutants_of(target, ROOT) if options.file in one.path]
    if options.again:
        earlier = map(json.loads, options.again.read_text("utf-8").splitlines())
        survivors = {tuple(one["key"]) for one in earlier if one["label"] in _LEFT}
        mutants = [one for one in mutants if _key_of(one) in survivors]
    if options.limit and options.limit < len(mutants):
        mutants = random.Random(options.seed).sample(mutants, options.limit)
    _say(f"{name}: {len(mutants)} of {len(everything)} mutants")
    start = time.monotonic()
    results = run_target(target, mutants, ROOT, options.processes, partial(_report, options.json))
    _say(f"{name}: {time.monotonic() - start:.0f} s, {_score_table(results)}")
    chosen = set(mutants)
    old = obsolete(_EXPLANATIONS, results, {_key_of(one) for one in everything if one not in chosen})
    for one in old:
        _say(f"the explanation matches no surviving mutant: {one.path}: {one.line}: {one.change}")
    return results, len(old)


def _key_of(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.path, line_text((ROOT / mutant.path).read_text("utf-8"), mutant.line), mutant.change


_EXPLANATIONS = read_explanations()
_LEFT = {"survived", "not reached"}


def _label(result: Result) -> str:
    is_explained = result.verdict in _LEFT and any(one.matches(result.key) for one in _EXPLANATIONS)
    return "explained" if is_explained else result.verdict


def _report(file: Path | None, result: Result) -> None:
    """Print the mutant if no test noticed it, and append the result to the file."""
    if _label(result) in _LEFT:
        mutant = result.mutant
        _say(f"{_label(result)}: {mutant.path}:{mutant.line}: {mutant.change}: {result.line_text}")
    if file:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(_as_dict(result), ensure_ascii=False) + "\n")


def _score_table(results: list[Result]) -> str:
    """Return a Markdown table with the score of each file."""
    rows = [
        "by file:",
        "",
        "| file | mutants | killed | explained | not reached | survived |",
        "|---|---|---|---|---|---|",
    ]
    for path in dict.fromkeys(one.mutant.path for one in results):
        count = Counter(_label(one) for one in results if one.mutant.path == path and one.verdict != "broken")
        killed = count["killed"] + count["timeout"]
        counts = (
            f"{killed} ({killed / count.total():.0%})",
            count["explained"],
            count["not reached"],
            count["survived"],
        )
        rows.append(f"| {path} | {count.total()} | {' | '.join(map(str, counts))} |")
    return "\n".join(rows)


def _as_dict(result: Result) -> dict[str, object]:
    facts = {"key": result.key, "line": result.mutant.line, "verdict": result.verdict, "label": _label(result)}
    return {**facts, "seconds": round(result.seconds, 2), "test": result.test}


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  # a program


if __name__ == "__main__":
    sys.exit(main())
