"""Run the state machine of the delivery for long, and print what it did."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from redis import Redis

from consumers.db.engine import engine
from consumers.embedded import servers
from tests.conftest import a_database, make_template
from tests.property.delivery.runs import RAM_FOLDER, new_world, run, settings_of
from tests.property.delivery.statistics import Statistics

_AT_ONCE = 100  # examples for each seed: Hypothesis keeps all of them in memory


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.property.delivery", description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="number of examples")
    parser.add_argument("--steps", type=int, default=40, help="most steps of an example")
    parser.add_argument("--seed", type=int, default=0, help=f"seed of the first {_AT_ONCE} examples")
    parser.add_argument("--no-shrink", action="store_true", help="show a failing run as it is, which takes less time")
    options = parser.parse_args()
    statistics = Statistics()
    with TemporaryDirectory(prefix="th-", dir=RAM_FOLDER or "/tmp") as home, servers(Path(home)) as pair:
        make_template(pair)
        with a_database(pair) as url:
            os.environ |= {"DATABASE_URL": url, "REDIS_URL": pair.redis_url}
            try:
                with new_world(Redis.from_url(pair.redis_url), url) as world:
                    for done in range(0, options.examples, _AT_ONCE):
                        chosen = settings_of(min(_AT_ONCE, options.examples - done), options.steps)
                        seed = options.seed + done // _AT_ONCE
                        run(world, chosen, statistics, seed, shrinks=not options.no_shrink)
                        print(f"seed {seed}: {statistics.summary()}", flush=True)
            finally:
                print(*statistics.lines(), sep="\n", flush=True)
                engine().dispose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
