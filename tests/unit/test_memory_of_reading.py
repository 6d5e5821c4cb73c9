"""Memory that a worker takes to validate a hostile text of 8 MiB, which is a compressed job of 8 KiB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_MAX_BYTES = 150 * 2**20  # a worker has 512 MiB, and its two threads may each read such a text at once

_SCRIPT = """
import sys
from pathlib import Path
from consumers.worker.batch import _reference_of
from producers.errors import InvalidEvent
from producers.events import KINDS, SignalArchive, decode, encode, event_of
from tests.factories import INSTANT, a_signal

EVENT_TYPE, START, REPEATED, TIMES, END = sys.argv[1:]

def peak():  # not ru_maxrss, which includes the peak of the process that forked this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

valid = encode(event_of(SignalArchive(archived_at=INSTANT, signals=[{"a": 1}]), source="x/1", sequence=7))
head, tail = valid.split('"signals":[{"a":1}]')
start, end = (valid[:-2] + ",", "}}") if START == "data" else (head + START, END + tail)
pieces = (REPEATED.replace("#", f"{number:06d}") if "#" in REPEATED else REPEATED for number in range(int(TIMES)))
text = start + ",".join(pieces) + end
before = peak()
try:
    answer = f"{len(decode(text, KINDS[EVENT_TYPE].model).data.signals)} signals"
except InvalidEvent as error:
    answer = str(error)
sequence = _reference_of(text).sequence
print(peak() - before, sequence, answer, sep="|")
"""

_ARCHIVE, _SNAPSHOT = "trading.signal-archive.v1", "trading.portfolio-snapshot.v1"
_TOO_MUCH = "event: has more than 1048576 brackets, colons and commas"
_OUR_SIGNAL = "{" + ",".join(f'"field_number_{n:02d}":{n}.#' for n in range(15)) + "}"


@pytest.mark.parametrize(
    ("event_type", "text", "expected"),
    [
        (_ARCHIVE, ('"signals":[', "[]", 2_790_000, "]"), _TOO_MUCH),
        (_ARCHIVE, ('"signals":[', '{"a":[]}', 900_000, "]"), _TOO_MUCH),
        (_SNAPSHOT, ("data", '"#":1', 760_000, ""), _TOO_MUCH),
        (_ARCHIVE, ("data", '"a":1', 1_390_000, ""), _TOO_MUCH),
        (_ARCHIVE, ("data", '"#":1', 500_000, ""), "data: has more than 100 fields"),
        (_ARCHIVE, ('"signals":[', "[]", 20_000, "]"), "data.signals.0: Input should be an object"),
        (_ARCHIVE, ('"signals":[{"a":[', "0.1", 1_000_000, "]}]"), "1 signals"),
        (_ARCHIVE, ('"signals":[', _OUR_SIGNAL, 20_000, "]"), "20000 signals"),
    ],
    ids=[
        *("lists as signals", "small signals", "unknown keys", "one repeated unknown key"),
        *("keys within the bound", "largest number of wrong signals", "numbers within the bound", "a full archive"),
    ],
)
def test_reading_any_text_takes_a_bounded_amount_of_memory(
    event_type: str, text: tuple[str, str, int, str], expected: str
) -> None:
    """This includes validating the event and finding the source of an invalid one."""
    command = [sys.executable, "-c", _SCRIPT, event_type, *map(str, text)]
    run = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    taken, sequence, answer = run.stdout.rstrip().split("|")

    assert (sequence, answer[: len(expected)]) == ("7", expected)
    assert int(taken) < _MAX_BYTES
