"""The old controller's JSON files, read: arrays of hundreds of megabytes, one entry at a time, numbers exact."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime, timezone, tzinfo
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from producers.errors import HistoryError, InvalidEvent
from producers.events import MAX_EVENT_BYTES, PortfolioSnapshot, SignalArchive
from producers.fields import TIME_RANGE
from producers.times import localized

_BLOCK_BYTES = 2**18
_MOST_CHARACTERS = 2 * MAX_EVENT_BYTES  # of one entry; what is longer is no event, however much of it is blanks
_TORN_CHARACTERS = 8192  # an error further from the end of what was read is no matter of where the reading stopped
_BLANKS = " \t\n\r"
_LITERALS = ("true", "false", "null", "-Infinity", "NaN")
_OPEN_STRING, _OPEN_ESCAPE = "Unterminated string", "Invalid \\uXXXX escape"
_MOST_DIGITS = 4000  # beyond 4300 Python refuses to make an int

SNAPSHOT_KEYS = frozenset({
    "date", "snapshot_date", "timestamp", "balance", "total_invested", "total_profit_loss", "total_value",
    "open_positions", "trade_count", "portfolio_id",
})  # fmt: skip
ARCHIVE_KEYS = frozenset({
    "archived_at", "archive_month", "signals_count", "signals", "signals_data", "portfolio_id",
})  # fmt: skip


class Entry(NamedTuple):
    """One element of the array, numbered from 0. Numbers are int and Decimal; it may be anything JSON knows."""

    index: int  # type: ignore[assignment]  # nobody searches an entry with tuple.index
    data: Any


class Damaged(HistoryError):
    """A file that is not a whole JSON array. `index` is the entry at which it stopped, `offset` the byte."""

    def __init__(self, path: Path, index: int, offset: int, reason: str) -> None:
        super().__init__(f"{path.name}: {reason} (entry {index}, byte {offset})")
        self.index = index
        self.offset = offset


def history_files(directory: Path) -> list[Path]:
    """portfolio_history.json and every signals_archive_*.json of a folder, as far as they exist, in order."""
    snapshots = directory / "portfolio_history.json"
    archives = sorted(path for path in directory.glob("signals_archive_*.json") if path.is_file())
    return [*([snapshots] if snapshots.is_file() else []), *archives]


def read_entries(path: Path, *, progress: Callable[[int], None] | None = None) -> Iterator[Entry]:
    """Every entry of the array in the file, in order; memory for one entry and a block.

    `progress` is called with the number of bytes read so far, after each block.

    Raises:
        Damaged: after every entry before the damage was given: it is empty, no array, cut off, or not JSON.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        text = _Text(file, progress)
        index = -1
        try:
            for index, value in enumerate(text.elements()):
                yield Entry(index, value)
        except _Broken as error:
            raise Damaged(path, index + 1, text.offset(error.position), error.reason) from None


class _Broken(Exception):
    """What is wrong, and where in the text that is held."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


def _number(text: str) -> int | Decimal:
    if len(text) < _MOST_DIGITS and text.lstrip("-").isdigit():
        return int(text)
    try:
        return Decimal(text)
    except InvalidOperation:
        return Decimal("NaN")  # an exponent beyond what a Decimal holds; every field refuses it


_DECODER = json.JSONDecoder(parse_float=Decimal)
_PATIENT_DECODER = json.JSONDecoder(parse_float=_number, parse_int=_number)


def _decode(text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except (ArithmeticError, ValueError):  # a number that Python will not make an int or a Decimal of
        return _PATIENT_DECODER.raw_decode(text, position)


class _Text:
    """A window on the file's text that moves on, element by element."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None] | None) -> None:
        self._file = file
        self._progress = progress
        # A byte that is not UTF-8 becomes a lone surrogate, which harms one entry and not the rest of the file.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self._position = 0
        self._passed_bytes = 0  # before the text that is held
        self._read_bytes = 0
        self._ended = False

    def offset(self, position: int) -> int:
        """The byte of the file at a position of the text that is held."""
        return self._passed_bytes + len(self._text[:position].encode("utf-8", "surrogateescape"))

    def elements(self) -> Iterator[Any]:
        if self._next() != "[":
            raise self._broken("is not a JSON array" if self._next() else "is empty")
        self._position += 1
        closed = self._next() == "]"
        while not closed:
            yield self._element()
            mark = self._next()
            if mark not in (",", "]"):
                raise self._broken("is not JSON: a comma or ] is missing" if mark else "is cut off")
            closed = mark == "]"
            self._position += not closed
        self._position += 1
        if self._next():
            raise self._broken("goes on behind the end of the array")

    def _next(self) -> str:
        """The next character that is not blank, which is not passed; empty at the end of the file."""
        while True:
            while self._position < len(self._text):
                character = self._text[self._position]
                if character not in _BLANKS:
                    return character
                self._position += 1
            if self._ended:
                return ""
            self._read_more(_BLOCK_BYTES)

    def _element(self) -> Any:
        if not self._next():
            raise self._broken("is cut off")
        size = _BLOCK_BYTES
        while True:
            try:
                value, end = _decode(self._text, self._position)
            except json.JSONDecodeError as error:
                near = error.pos + _TORN_CHARACTERS >= len(self._text)
                if not near and not error.msg.startswith(_OPEN_STRING):
                    raise _Broken(error.pos, f"is not JSON: {error.msg}") from None
                if self._ended:
                    raise self._last_words(error) from None
            except RecursionError:
                raise self._broken("is nested too deeply") from None
            else:
                # Only what comes after a number tells that it is whole.
                if end < len(self._text) or self._ended:
                    self._position = end
                    return value
            if len(self._text) - self._position > _MOST_CHARACTERS:
                raise self._broken(f"has an entry of more than {_MOST_CHARACTERS // 2**20} million characters")
            self._read_more(size)
            size *= 2

    def _last_words(self, error: json.JSONDecodeError) -> _Broken:
        rest = self._text[error.pos :].strip()
        cut_off = any(word.startswith(rest) for word in _LITERALS) or error.msg.startswith((_OPEN_STRING, _OPEN_ESCAPE))
        return self._broken("is cut off") if cut_off else _Broken(error.pos, f"is not JSON: {error.msg}")

    def _read_more(self, size: int) -> None:
        block = self._file.read(size)
        if self._read_bytes == 0 and block.startswith(codecs.BOM_UTF8):
            self._passed_bytes = len(codecs.BOM_UTF8)
        self._read_bytes += len(block)
        self._ended = not block
        self._passed_bytes = self.offset(self._position)
        self._text = self._text[self._position :] + self._decoder.decode(block, self._ended)
        self._position = 0
        if self._progress is not None:
            self._progress(self._read_bytes)

    def _broken(self, reason: str) -> _Broken:
        return _Broken(self._position, reason)


def snapshot_from(
    data: Any, *, zone: tzinfo, portfolio_id: int | None, after: datetime | None = None
) -> PortfolioSnapshot:
    """The event of one entry of portfolio_history.json. A naive time is in `zone`.

    Its own `date` stands even when its time has another one; its own portfolio_id, if any, goes before the given one.
    `after` is the instant of the entry before it: of a local time that exists twice, the second is meant when the
    first would lie before it. One that does not exist is read with the offset that was valid before the gap.

    Raises:
        InvalidEvent: a field is missing or wrong; the message names it.
    """
    entry = _object(data)
    moment = _moment(entry, "timestamp", zone, after)
    return PortfolioSnapshot.checked(
        snapshot_date=_day(entry, moment),
        timestamp=moment,
        balance=_amount(entry, "balance"),
        total_invested=_amount(entry, "total_invested"),
        total_profit_loss=_amount(entry, "total_profit_loss"),
        total_value=_amount(entry, "total_value"),
        open_positions=_count(entry, "open_positions"),
        trade_count=_count(entry, "trade_count"),
        portfolio_id=_portfolio(entry, portfolio_id),
    )


def archive_from(data: Any, *, zone: tzinfo, portfolio_id: int | None, after: datetime | None = None) -> SignalArchive:
    """The event of one entry of a signals_archive_*.json, in the same way; the array decides how many signals."""
    entry = _object(data)
    return SignalArchive.checked(
        archived_at=_moment(entry, "archived_at", zone, after),
        signals=_given(entry, "signals_data" if "signals" not in entry and "signals_data" in entry else "signals"),
        portfolio_id=_portfolio(entry, portfolio_id),
    )


def notes_on(data: Mapping[str, Any], event: PortfolioSnapshot | SignalArchive) -> Iterator[str]:
    """What an entry says that its event does not: nothing of it is wrong enough to refuse it."""
    known = SNAPSHOT_KEYS if isinstance(event, PortfolioSnapshot) else ARCHIVE_KEYS
    if not data.keys() <= known:
        yield from (f"unknown key {key[:60]!a} left out" for key in sorted(data.keys() - known))
    if isinstance(event, PortfolioSnapshot):
        if event.snapshot_date != event.timestamp.date():
            yield "date is not the date of timestamp, and was kept"
    elif data.get("signals_count", event.signals_count) != event.signals_count:
        yield "signals_count is not the number of signals, and was corrected"
    elif data.get("archive_month", event.archive_month) != event.archive_month:
        yield "archive_month is not the month of archived_at, and was corrected"


def _object(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise InvalidEvent.at("entry", f"must be an object, not {type(data).__name__}")
    return data


def _given(entry: Mapping[str, Any], field: str) -> Any:
    value = entry.get(field)
    if value is None:
        raise InvalidEvent.at(field, "is missing")
    return value


def _amount(entry: Mapping[str, Any], field: str) -> Any:
    value = _given(entry, field)
    return value.strip() if isinstance(value, str) else value


def _count(entry: Mapping[str, Any], field: str) -> Any:
    value = _given(entry, field)
    if isinstance(value, int):
        return value
    try:
        number = Decimal(value)
        # What is far out of range anyway must not become an int of a million digits first.
        whole = number.is_finite() and abs(number) < 2**63 and number == number.to_integral_value()
    except (ArithmeticError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InvalidEvent.at(field, "must be a whole number in the range of a count")
    return int(number)


def _portfolio(entry: Mapping[str, Any], portfolio_id: int | None) -> int | None:
    return portfolio_id if entry.get("portfolio_id") is None else entry["portfolio_id"]


def _moment(entry: Mapping[str, Any], field: str, zone: tzinfo, after: datetime | None) -> datetime:
    value = _given(entry, field)
    try:
        value = datetime.fromisoformat(value.strip()) if isinstance(value, str) else value
    except ValueError:
        raise InvalidEvent.at(field, "is text that is not an ISO 8601 time") from None
    if not isinstance(value, datetime):
        raise InvalidEvent.at(field, f"must be a time, not {type(value).__name__}")
    naive = value.utcoffset() is None
    moment = _fixed(localized(value, zone, field), field)
    if naive and after is not None and moment < after:
        # Python gives the second reading of a time inside a gap an earlier instant; that one is never meant.
        return max(moment, _fixed(localized(value.replace(fold=1), zone, field), field))
    return moment


def _fixed(moment: datetime, field: str) -> datetime:
    """With its offset alone: two times of one zone would compare by their clocks, not by their instants."""
    try:
        offset = moment.utcoffset()
    except (ValueError, OverflowError):
        raise InvalidEvent.at(field, TIME_RANGE) from None
    if offset is None:
        raise InvalidEvent.at(field, "has no UTC offset")
    return moment.replace(tzinfo=UTC if not offset else timezone(offset), fold=0)


def _day(entry: Mapping[str, Any], moment: datetime) -> Any:
    field = "date" if "date" in entry else "snapshot_date"
    day = entry.get(field)
    if day is None:
        return moment.date()
    try:
        return date.fromisoformat(day.strip()) if isinstance(day, str) else day
    except ValueError:
        raise InvalidEvent.at(field, "is text that is not an ISO 8601 date") from None
