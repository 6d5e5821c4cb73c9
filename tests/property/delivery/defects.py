"""Put known defects into copies of the source, one at a time: the machine must find each of them.

python -m tests.property.delivery.defects --folder /tmp/defects
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parents[3]
_SOURCES = ("producers", "consumers", "tests", "schema.sql", "pyproject.toml")


class Change(NamedTuple):
    """Text of one file, and the text that replaces it."""

    file: str
    right: str
    wrong: str


class Defect(NamedTuple):
    """Changes that make a defect, and the message of the model that finds it, as a regular expression."""

    message: str
    changes: tuple[Change, ...]


_ANSWER = "its (receipt|acknowledgement) says"
_SEND = "            self._send(gone)\n"
_MARK = """\
            # After a failure, the batch that failed remains in doubt: the next one begins with its second entry.
            self.in_doubt = not self._deliveries.mark_sent(_next_checks(entries)) or limit == 1
"""
_ACKNOWLEDGE_EARLY = """
        from consumers.handlers import _acknowledge
        from producers.settings import TransportSettings
        from tests.property.delivery.faults import write_counts

        write_counts.redis += 1  # this client is not one of those that the machine knows
        with TransportSettings.from_environment().redis() as early:
            for one in results:
                _acknowledge(early, one)
"""

DEFECTS: dict[str, Defect] = {
    "a relay settles by source and sequence only": Defect(_ANSWER, (
        Change(
            "producers/outbox_deliveries.py",
            "delivery = (one.sequence, one.nonce)\n",
            "delivery = next((key for key in entries if key[0] == one.sequence), (one.sequence, one.nonce))\n",
        ),
        Change("producers/outbox_deliveries.py", " and one.event_id in (None, event_id)", ""),
    )),
    "acknowledged before the commit": Defect(_ANSWER, (
        Change(
            "consumers/worker/batch.py",
            "        forget_outcomes(db, [result.job_id for result in results if result.job_id not in noted])\n",
            "        forget_outcomes(db, [result.job_id for result in results if result.job_id not in noted])\n"
            + _ACKNOWLEDGE_EARLY,
        ),
    )),
    "no unique key on event_id": Defect("two rows of one event", (
        Change("schema.sql", "portfolio_history_event_once UNIQUE (event_id)", "p UNIQUE (event_id, id)"),
        Change("schema.sql", "signal_archives_event_once UNIQUE (event_id)", "s UNIQUE (event_id, id)"),
        Change("consumers/db/inserts.py", "ON CONFLICT (event_id) DO NOTHING", "ON CONFLICT DO NOTHING"),
    )),
    "a valid lease does not keep its jobs": Defect("taken from a worker that has a lease", (
        Change("consumers/worker/scripts/requeue_expired.lua", "if left ~= -2 then return {{}, {}} end", ""),
    )),
    "an expired lease is not noticed": Defect("never settled|jobs that no worker finishes", (
        Change("consumers/worker/scripts/requeue_expired.lua", "if left ~= -2 then", "if true then"),
    )),
    "the token of an outbox is not compared": Defect("two outboxes use one source", (
        Change("producers/copies.py", "is_own = found <= self._outbox.header.read().tokens", "is_own = True"),
    )),
    "the token of a killed relay counts as that of a copy": Defect("an outbox that was never copied has more than", (
        Change("producers/outbox_header.py", "{self.token, *self.other_tokens}", "{self.token}"),
    )),
    "marked as sent before Redis has the job": Defect("sent, but its job is nowhere", (
        Change("producers/entry_sender.py", _SEND + _MARK, _MARK + _SEND),
    )),
    "an entry in doubt is sent without a look": Defect("its job is in 2 places", (
        Change("producers/entry_sender.py", "if may_be_sent else entries", "if False else entries"),
    )),
    "other content under a known id counts as a duplicate": Defect(_ANSWER + "|a duplicate of no row", (
        Change("consumers/db/inserts.py", "if same else EventConflict(", "if True else EventConflict("),
    )),
    "a resend does not delete old acknowledgements": Defect(_ANSWER + "|not stored again by a resend", (
        Change("producers/history_producer.py", "        transport.relay.delete_acknowledgements()\n", ""),
    )),
}  # fmt: skip


def copy_with(changes: tuple[Change, ...], folder: Path) -> None:
    """Copy the source into `folder`, with these changes."""
    folder.mkdir(parents=True)
    for name in _SOURCES:
        source = _ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for change in changes:
        file = folder / change.file
        text = file.read_text("utf-8")
        if text.count(change.right) != 1:
            raise SystemExit(f"{change.file} has changed; adapt the defect in {__file__}: {change.right!r}")
        file.write_text(text.replace(change.right, change.wrong), "utf-8")


def find(name: str, folder: Path, examples: int, seed: int, *, shrink: bool) -> str:
    """Run the machine on a copy with this defect. Returns one line that says when it was found."""
    place = folder / re.sub(r"\W+", "-", name)
    copy_with(DEFECTS[name].changes, place)
    command = [sys.executable, "-m", "tests.property.delivery", "--examples", str(examples), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    output = place / "output.txt"
    with output.open("wb") as file:
        options = [] if shrink else ["--no-shrink"]
        subprocess.run([*command, *options], cwd=place, env=environment, stdout=file, stderr=file, check=False)
    text = output.read_text("utf-8")
    first = re.search(r"first failure: (in example \d+, after \d+ steps): (.{,100})", text)
    shrunk = re.search(r"^shrunk from \d+ to \d+ steps in \d+ s", text, re.MULTILINE)
    if first is None:
        result = "NOT FOUND"
    elif re.match(f"AssertionError: ({DEFECTS[name].message})", first[2]):
        result = f"found {first[1]}"
    else:
        result = f"NOT FOUND, but another failure {first[1]}: {first[2]}"
    return f"{name}: {result}" + (f"; {shrunk[0]}" if shrunk else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.property.delivery.defects", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the copies and their output")
    parser.add_argument("--examples", type=int, default=500, help="most examples for each defect")
    parser.add_argument("--seed", type=int, default=0, help="repeats a run")
    parser.add_argument("--only", default="", help="part of the names of the defects to try")
    parser.add_argument("--no-shrink", action="store_true", help="do not shrink the runs that find them")
    options = parser.parse_args()
    found = []
    for name in DEFECTS:
        if options.only in name:
            found.append(find(name, options.folder, options.examples, options.seed, shrink=not options.no_shrink))
            print(found[-1], flush=True)
    return int(any("NOT FOUND" in line for line in found))


if __name__ == "__main__":
    sys.exit(main())
