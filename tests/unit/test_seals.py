"""Seals: files with the digests of an outbox that are kept elsewhere."""

from __future__ import annotations

import errno
import json
import os
import socket
from hashlib import sha256
from pathlib import Path

import pytest

from consumers.errors import SealError
from consumers.ops.seal import read_seal, write_seal
from producers.segments import CHAIN_START, Segment, SettledEvent, continued

CHAINS = {
    "bot/1": continued(None, [SettledEvent(n, n == 2, bytes([n]) * 32) for n in (1, 2, 5)]),
    "bot/2": [Segment(CHAIN_START, b"h" * 32, ((7, 7),), frozenset(), b"p" * 8)],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "seal"


def _with_checksum(*lines: object) -> str:
    body = "".join(json.dumps(line) + "\n" for line in lines)
    return body + json.dumps({"sha256": sha256(body.encode()).hexdigest()}) + "\n"


def test_a_seal_is_read_as_it_was_written(file: Path) -> None:
    assert write_seal(file, CHAINS) == 4
    assert read_seal(file).chains == CHAINS
    header = json.loads(file.read_text().partition("\n")[0])
    assert header == {
        "format": "trading-history seal 1",
        "made_at": read_seal(file).made_at.isoformat(),
        "host": socket.gethostname(),
    }


def test_a_seal_replaces_no_file(file: Path) -> None:
    file.write_text("earlier")
    with pytest.raises(SealError, match="exists, and a seal is never overwritten: write it to a new file"):
        write_seal(file, CHAINS)
    assert file.read_text() == "earlier"


def test_a_seal_that_cannot_be_opened_is_an_error(file: Path) -> None:
    with pytest.raises(SealError, match="cannot write the seal .*: No such file or directory"):
        write_seal(file / "seal", CHAINS)
    with pytest.raises(SealError, match="cannot read the seal .*: No such file or directory"):
        read_seal(file)


@pytest.mark.parametrize("is_gone", [False, True], ids=["there", "removed meanwhile"])
def test_a_seal_whose_write_fails_is_removed(file: Path, monkeypatch: pytest.MonkeyPatch, is_gone: bool) -> None:
    """The disk is full, for example."""
    synced = []

    def full(_: int) -> None:
        synced.append(file.read_text())
        if is_gone:
            file.unlink()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SealError, match="cannot write the seal .*: No space left on device. It was removed"):
            write_seal(file, CHAINS)
    assert not file.exists()
    write_seal(file, CHAINS)
    assert synced[0].count("\n") == file.read_text().count("\n")  # the whole text has been written before


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            [{"format": "seal 2"}],
            "is a seal of another version of this program: 'seal 2'",
        ),
        ([{"format": "trading-history seal 1"}], "is not a complete seal: give a file that audit --seal has written"),
        ([["format"]], "is not a complete seal"),
    ],
)
def test_a_file_that_is_no_seal_of_this_version_is_refused(file: Path, lines: list[object], reason: str) -> None:
    file.write_text(_with_checksum(*lines))
    with pytest.raises(SealError, match=reason):
        read_seal(file)


def test_a_seal_that_was_changed_or_cut_off_is_refused(file: Path) -> None:
    write_seal(file, CHAINS)
    text = file.read_text()
    file.write_text(text.replace("bot/1", "bot/3", 1))
    with pytest.raises(SealError, match="was cut off or changed: its checksum does not match"):
        read_seal(file)
    for end in (0, 1, len(text) // 2, len(text) - 3):
        file.write_text(text[:end])
        with pytest.raises(SealError, match="is not a complete seal|was cut off or changed"):
            read_seal(file)


def test_digests_with_other_characters_are_refused(file: Path) -> None:
    """Base64 would skip them."""
    write_seal(file, CHAINS)
    header, line, *_ = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(_with_checksum(header, line | {"prefixes": line["prefixes"] + "!"}))
    with pytest.raises(SealError, match="is not a complete seal"):
        read_seal(file)
