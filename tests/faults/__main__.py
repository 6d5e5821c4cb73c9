"""Long fault tests. Exit status 1: a promise was broken.

storm (default): random faults of servers and processes, e.g. `python -m tests.faults --minutes 20`.
failover: Redis behind Sentinel, whose master is killed and then paused.
exits: controllers that record two events and exit, with a worker and without Redis.
night: faults for half an hour, while Prometheus evaluates the alert rules: a late, missing or false alert is a problem.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from consumers.embedded.stack import embedded_stack
from tests.faults.exits import print_exits
from tests.faults.failover import print_failovers, run_failovers
from tests.faults.night import end_in_time, run_night, run_sites, table_of
from tests.faults.storm import Storm, run_storm
from tests.faults.verdict import Verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", choices=("storm", "failover", "exits", "night"), nargs="?", default="storm")
    parser.add_argument("--minutes", type=float, default=20, help="storm: duration of the faults (default 20)")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(10**6), help="storm, night: repeat the faults of this seed"
    )
    parser.add_argument("--folder", type=Path, help="storm, night: an empty folder with a short path; it is kept")
    parser.add_argument("--runs", type=int, default=200, help="exits: number of runs of each kind (default 200)")
    sites = ("first", "second", "short")
    parser.add_argument(
        "--site", choices=sites, help="night: one site only; short: three faults, in less than a minute"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="night: write the result to this file")
    options = parser.parse_args()
    if options.test == "failover":
        return _failover()
    if options.test == "exits":
        return _exits(options.runs)
    if options.test == "night":
        return _night(options)
    logging.getLogger("producers.relay").setLevel(logging.ERROR)  # it would log thousands of rejections
    print(f"seed {options.seed}", flush=True)
    with _folder(options) as folder:
        storm, judged = run_storm(folder, seconds=options.minutes * 60, seed=options.seed)
        _print_storm(storm, judged, options.minutes)  # before its folder is removed
    return 1 if judged.breaches else 0


@contextmanager
def _folder(options: argparse.Namespace) -> Iterator[Path]:
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        yield options.folder
        return
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        yield Path(folder)


def _night(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format=f"{options.site} %(message)s")
    logging.getLogger("producers").setLevel(logging.ERROR)
    end_in_time(options.site)
    if options.site is None:
        problems = run_sites(seed=options.seed, file=options.json)
        print(f"{len(problems)} problems of both sites, seed {options.seed}")
        return 1 if problems else 0
    with _folder(options) as folder:
        result = run_night(folder, site=options.site, seed=options.seed)
    print(table_of(result), flush=True)
    if options.json is not None:
        options.json.write_text(result.as_json())
    return 1 if result.problems else 0


def _print_storm(storm: Storm, judged: Verdict, minutes: float) -> None:
    for name, count in sorted(storm.faults.items()):
        print(f"{count:6} {name}")
    print(f"{storm.faults.total():6} faults in {minutes:g} minutes")
    print(
        f"{judged.accepted} events accepted: {judged.rows} rows,"
        f" {judged.duplicate} duplicates, {judged.rejected} rejected"
    )
    for name, outcomes in judged.by_controller.items():
        counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        print(f"{outcomes.total():6} {name}: {counts}")
    print(
        f"{len(storm.controllers.outboxes())} outboxes, {len(storm.controllers.salvaged_files())} damaged and salvaged"
    )
    for kind, count in (+storm.programs.failures).items():
        print(f"{count:6} times a {kind} ended with an error")
    print(f"at most {storm.worst_queue_entries} queue entries of one delivery")
    print(f"{len(judged.breaches)} breaches of the promise")
    for breach in judged.breaches[:20]:
        print(f"  {breach}")


def _exits(runs: int) -> int:
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        return print_exits(Path(folder), runs)


def _failover() -> int:
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:
        home = Path(folder)
        (home / "sentinel").mkdir()
        with embedded_stack(home):
            return print_failovers(run_failovers(home / "sentinel", ["killed", "paused"]))


if __name__ == "__main__":
    sys.exit(main())
