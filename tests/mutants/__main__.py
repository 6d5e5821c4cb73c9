"""Change one place of the source at a time, and see whether a test fails.

python -m tests.mutants contract --json /tmp/contract.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

from tests.mutants.explanations import key_of, obsolete, read_explanations
from tests.mutants.mutant import Mutant
from tests.mutants.running import Result, mutants_of, run_target
from tests.mutants.targets import TARGETS
from tests.mutants.tree import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; by default all")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--limit", type=int, help="most mutants of a target: a random sample")
    parser.add_argument("--seed", type=int, default=0, help="repeats a sample")
    parser.add_argument("--processes", type=int, default=1, help="number of mutants at a time")
    parser.add_argument("--file", default="", help="mutate only files whose path contains this text")
    parser.add_argument("--again", type=Path, help="only the mutants that survived according to this file of --json")
    options = parser.parse_args()
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target is named {', '.join(unknown)}")
    results, obsolete_count = [], 0
    for name in options.targets or TARGETS:
        found, count = _run(name, options)
        results += found
        obsolete_count += count
        if options.json:
            options.json.write_text(json.dumps([_as_dict(one) for one in results], indent=1, ensure_ascii=False))
    return int(obsolete_count > 0 or any(_label(one) in {"survived", "not reached"} for one in results))


def _run(name: str, options: argparse.Namespace) -> tuple[list[Result], int]:
    """Run one target and print its report. Returns the results and the number of obsolete explanations."""
    target = TARGETS[name]
    mutants = everything = [one for one in mutants_of(target, ROOT) if options.file in one.path]
    if options.again:
        survivors = {
            tuple(one["key"])
            for one in json.loads(options.again.read_text())
            if one["label"] in {"survived", "not reached"}
        }
        mutants = [one for one in mutants if (one.path, _line_of(one), one.change) in survivors]
    if options.limit and options.limit < len(mutants):
        mutants = random.Random(options.seed).sample(mutants, options.limit)  # noqa: S311  # a repeatable sample
    _say(f"{name}: {len(mutants)} of {len(everything)} mutants")
    start = time.monotonic()
    results = run_target(target, mutants, ROOT, options.processes, _report)
    _say(f"{name}: {time.monotonic() - start:.0f} s, {_score_table(results)}")
    chosen = set(mutants)
    old = obsolete(read_explanations(), results, {(one.path, one.change) for one in everything if one not in chosen})
    for one in old:
        _say(f"the explanation matches no surviving mutant: {one.path}: {one.line}: {one.change}")
    return results, len(old)


def _line_of(mutant: Mutant) -> str:
    return (ROOT / mutant.path).read_text("utf-8").split("\n")[mutant.line - 1].strip()


_EXPLAINED = {one.key for one in read_explanations()}


def _label(result: Result) -> str:
    is_left = result.verdict in {"survived", "not reached"}
    return "explained" if is_left and key_of(result) in _EXPLAINED else result.verdict


def _report(result: Result) -> None:
    """Print each mutant that no test noticed."""
    if _label(result) in {"survived", "not reached"}:
        mutant = result.mutant
        _say(f"{_label(result)}: {mutant.path}:{mutant.line}: {mutant.change}: {result.line_text}")


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
    facts = {"key": key_of(result), "line": result.mutant.line, "verdict": result.verdict, "label": _label(result)}
    return {**facts, "seconds": round(result.seconds, 2), "test": result.test}


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  # a program


if __name__ == "__main__":
    sys.exit(main())
