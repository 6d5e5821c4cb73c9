"""A long storm of faults: `python -m tests.faults --minutes 20 [--seed N]`. Exit status 1 if a promise was broken.

`python -m tests.faults failover`: Redis behind Sentinel, the master killed and another one paused.
`python -m tests.faults exits --runs 200`: controllers that record two events and end, with a worker and without Redis.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from consumers.stack import embedded_stack
from tests.faults.exits import print_exits
from tests.faults.failover import print_failovers, run_failovers
from tests.faults.storm import run_storm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("storm", "failover", "exits"), nargs="?", default="storm")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--folder", type=Path, help="an empty folder with a short path, which is kept")
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    if options.what == "failover":
        return _failover()
    if options.what == "exits":
        with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as home:
            return print_exits(Path(home), options.runs)
    print(f"seed {options.seed}", flush=True)
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="th-", dir="/tmp")))
        storm, judged = run_storm(folder, seconds=options.minutes * 60, seed=options.seed)
    for name, count in sorted(storm.faults.items()):
        print(f"{count:6} {name}")
    print(f"{storm.faults.total():6} faults in {options.minutes} minutes")
    print(
        f"{judged.accepted} events accepted: {judged.rows} rows,"
        f" {judged.duplicate} duplicates, {judged.rejected} rejected"
    )
    for name, fates in judged.by_controller.items():
        print(f"{fates.total():6} {name}: {', '.join(f'{count} {fate}' for fate, count in fates.most_common())}")
    print(
        f"{len(storm.controllers.outboxes())} outboxes, {len(storm.controllers.salvaged_files())} damaged and salvaged"
    )
    print(f"at worst {storm.worst_queue_entries} queue entries of one delivery")
    print(f"{len(judged.breaches)} breaches of the promise")
    for breach in judged.breaches[:20]:
        print(f"  {breach}")
    return 1 if judged.breaches else 0


def _failover() -> int:
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        home = Path(folder)
        (home / "sentinel").mkdir()
        with embedded_stack(home):
            return print_failovers(run_failovers(home / "sentinel", ["killed", "paused"]))


if __name__ == "__main__":
    sys.exit(main())
