"""The process that fuzzes one target: the only module that needs atheris. `python -m tests.fuzz` starts it.

A finding does not end it: each defect is kept once, as a reduced input and its traceback.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import traceback
from functools import partial
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import atheris

from tests.fuzz.invariants import Target, failure_of, reduced, signature, target_named
from tests.fuzz.json_mutations import mutated

_MAX_BYTES = 8192
_MAX_SECONDS = 60  # of one input; a check of CPU time finds slow ones earlier
_MAX_MIB = 2048
_STORED_ONE_IN = 16
_STORED_AT_ONCE = 2000


def main(name: str, folder: Path, seconds: int) -> None:
    """Fuzz the target. Write to `corpus` and `findings` in `folder`."""
    logging.getLogger().addHandler(logging.NullHandler())
    with atheris.instrument_imports(include=["producers", "consumers"]):
        target = target_named(name)
    corpus, findings = folder / "corpus", folder / "findings"
    for one in (corpus, findings):
        one.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / sha256(seed).hexdigest()[:16]).write_bytes(seed)
    os.chdir(tempfile.mkdtemp(prefix="th-"))  # without .env, and without an outbox
    arguments = [
        *(f"-max_total_time={seconds}", f"-max_len={_MAX_BYTES}", f"-timeout={_MAX_SECONDS}"),
        *(f"-rss_limit_mb={_MAX_MIB}", f"-dict={Path(__file__).with_name('words.dict')}", "-print_final_stats=1"),
        *(f"-artifact_prefix={findings}/", str(corpus)),
    ]
    stores = name != "api"  # this one reads rows that it has inserted once
    mutator = {"custom_mutator": _mutated} if stores else {}
    atheris.Setup([sys.argv[0], *arguments], _Checks(target, findings, stores=stores), **mutator)
    atheris.Fuzz()


def _mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """Change the tree of a JSON text, or else any bytes. The first byte is kept if the JSON begins after it."""
    chance = random.Random(seed)
    if chance.random() < 0.6:
        start = 0 if data[:1] in (b"{", b"[") else 1
        try:
            text = mutated(data[start:].decode(), chance)
            changed = data[:start] + text.encode("utf-8", "surrogatepass")
        except (ArithmeticError, RecursionError, ValueError):
            changed = b""
        if 0 < len(changed) <= max_size:
            return changed
    return bytes(atheris.Mutate(data, max_size))


class _Checks:
    """Function that libFuzzer calls for each input. If the target `stores`, it does so with one input in 16."""

    def __init__(self, target: Target, findings: Path, *, stores: bool) -> None:
        self._target = target
        self._findings = findings
        self._stores = stores
        self._stored = 0

    def __call__(self, data: bytes) -> None:
        error = failure_of(self._check, data)
        if error is not None:
            self._keep(error, data)

    def _check(self, data: bytes) -> None:
        store = self._stores and crc32(data) % _STORED_ONE_IN == 0  # a transaction takes longer than the rest
        self._target.check(data, store=store)
        self._stored += store
        if self._stored >= _STORED_AT_ONCE:
            self._stored = 0
            _forget_rows()

    def _keep(self, error: BaseException, data: bytes) -> None:
        found = signature(error)
        file = self._findings / found.replace(" ", "-").replace(":", "-")
        if file.exists():
            return
        file.write_bytes(data)
        data = reduced(partial(self._target.check, store=self._stores), data)
        file.write_bytes(data)
        shown = "".join(traceback.format_exception(error))
        file.with_name(file.name + ".txt").write_text(f"{data!r}\n\n{shown}", "utf-8", "backslashreplace")
        print(f"FINDING {found}: {str(error)[:300]!a}", file=sys.stderr, flush=True)


def _forget_rows() -> None:
    from consumers.db.engine import get_db

    with get_db() as db:
        db.exec_driver_sql("TRUNCATE portfolio_history, signal_archives, event_outcomes RESTART IDENTITY")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
