"""Seals: files with the digests of an outbox, to be kept where the owner of the database cannot change them.

A seal is text: a header, a line for each segment, and a last line with a checksum, all of them JSON.
"""

from __future__ import annotations

import json
import os
import socket
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from consumers.errors import SealError
from producers.segments import Segment

_FORMAT = "trading-history seal 1"


@dataclass(frozen=True)
class Seal:
    """Segments of each source, as they were at `made_at`."""

    made_at: datetime
    chains: dict[str, list[Segment]] = field(default_factory=dict)


def write_seal(file: Path, chains: Mapping[str, Sequence[Segment]]) -> int:
    """Write a new file with these chains, and return the number of events in it.

    Raises:
        SealError: the file exists, or cannot be written.
    """
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    header = {"format": _FORMAT, "made_at": made_at, "host": socket.gethostname()}
    body = "".join(json.dumps(line) + "\n" for line in (header, *_lines(chains)))
    text = body + json.dumps({"sha256": sha256(body.encode()).hexdigest()}) + "\n"
    try:
        seal = open(file, "x", encoding="ascii")  # noqa: SIM115  # an earlier seal is never overwritten
    except FileExistsError:
        raise SealError(f"{file} exists, and a seal is never overwritten: write it to a new file") from None
    except OSError as error:
        raise SealError(f"cannot write the seal {file}: {error.strerror}") from error
    try:
        with seal:
            seal.write(text)
            seal.flush()
            os.fsync(seal.fileno())
    except OSError as error:
        file.unlink(missing_ok=True)
        raise SealError(f"cannot write the seal {file}: {error.strerror}. It was removed") from error
    return sum(len(segment.sequences) for segments in chains.values() for segment in segments)


def _lines(chains: Mapping[str, Sequence[Segment]]) -> Iterator[dict[str, Any]]:
    for source, segments in chains.items():
        for segment in segments:
            yield {
                "source": source,
                "previous_head": segment.previous_head.hex(),
                "head": segment.head.hex(),
                "ranges": segment.ranges,
                "rejected": sorted(segment.rejected),
                "prefixes": b64encode(segment.prefixes).decode(),
            }


def read_seal(file: Path) -> Seal:
    """Return the seal in a file.

    Raises:
        SealError: the file cannot be read, is not a seal, or was cut off or changed.
    """
    try:
        body, _, end = file.read_text(encoding="ascii").rstrip("\n").rpartition("\n")
        header, *lines = [json.loads(line) for line in body.split("\n")]
        if header["format"] != _FORMAT:
            raise SealError(f"{file} is a seal of another version of this program: {header['format']!r:.60}")
        if json.loads(end)["sha256"] != sha256(f"{body}\n".encode()).hexdigest():
            raise SealError(f"{file} was cut off or changed: its checksum does not match. Use another copy of it")
        seal = Seal(datetime.fromisoformat(header["made_at"]))
        for line in lines:
            seal.chains.setdefault(line["source"], []).append(_segment(line))
    except OSError as error:
        raise SealError(f"cannot read the seal {file}: {error.strerror}") from error
    except (KeyError, RecursionError, TypeError, ValueError):
        raise SealError(f"{file} is not a complete seal: give a file that audit --seal has written") from None
    return seal


def _segment(line: Mapping[str, Any]) -> Segment:
    return Segment(
        previous_head=bytes.fromhex(line["previous_head"]),
        head=bytes.fromhex(line["head"]),
        ranges=tuple((first, last) for first, last in line["ranges"]),
        rejected=frozenset(line["rejected"]),
        prefixes=b64decode(line["prefixes"], validate=True),
    )
