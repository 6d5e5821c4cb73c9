"""Read large JSON arrays from files, one entry at a time, with exact numbers; write them completely or not at all.

Several arrays, JSON lines, and an array inside an object under a known name are read too.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import simplejson

from consumers.legacy.file_shapes import HEAD_BYTES, has_objects, is_entry, shape_of_bytes, shape_of_object
from producers.errors import FileNotWritten, HistoryError
from producers.events import MAX_EVENT_BYTES
from producers.fields import readable

_BLOCK_BYTES = 2**18
_MOST_CHARACTERS = 2 * MAX_EVENT_BYTES  # of one entry, blanks included; a longer one cannot be an event
_TORN_CHARACTERS = 8192  # an error further from the end of the buffered text is not due to the missing rest
_IF_EMPTY = "restore it from a backup, or delete it if it never had an entry"
_BLANKS = " \t\n\r\ufeff"  # a byte order mark may precede each line
_LITERALS = ("true", "false", "null", "Infinity", "-Infinity", "NaN")
_OPEN_STRING, _OPEN_ESCAPE = "Unterminated string", "Invalid \\uXXXX escape"
_MOST_DIGITS = 4000  # Python's int() rejects more than 4300 digits
_NAME = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')
_COMMA = re.compile(r"[ \t\n\r]*,")
_NOT_OF_NUMBER = re.compile(r"[^-+.0-9eE]")
# Names of an array of entries in an object, and its beginning.
_ARRAYS = ("history", "portfolio_history", "snapshots", "signals")
_ARRAY = re.compile(r"\[[ \t\n\r]*(?=[{\]])")

_ENTRY_ENCODER = simplejson.JSONEncoder(ensure_ascii=False, use_decimal=True, allow_nan=False)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


class Entry(NamedTuple):
    """One element of the array, numbered from 0. `data` is any JSON value; its numbers are int or Decimal."""

    index: int  # type: ignore[assignment]  # tuple.index is not needed
    data: Any


class Damaged(HistoryError):
    """The file is not a complete JSON array. `index` is the number of the entry at which reading stopped.

    If the whole file has another shape, `offset` is None.
    """

    def __init__(self, path: Path, index: int, offset: int | None, reason: str) -> None:
        place = "" if offset is None else f" (entry {index}, byte {offset})"
        super().__init__(f"{path.name}: {reason}{place}")
        self.index = index


def read_entries(path: Path, *, progress: Callable[[int], None] | None = None) -> Iterator[Entry]:
    """Yield every entry of the file, in order. Memory is bounded by one entry and one block.

    The file has a JSON array; or an object with one array of entries, in `history`, `portfolio_history`, `snapshots` or
    `signals`; or JSON lines of entries; or several of these, with or without commas between them. After each block,
    `progress` is called with the number of bytes read so far.

    Raises:
        Damaged: the path is not a file, or the file is empty, cut off, of another shape, or not JSON. All entries
            before the damage were yielded.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise Damaged(path, 0, 0, "is not a file")
    with path.open("rb") as file:
        shape = shape_of_bytes(file.read(HEAD_BYTES), path)
        if shape is not None:
            raise Damaged(path, 0, None, shape)
        file.seek(0)
        text = _Text(file, progress)
        index = -1
        try:
            for index, value in enumerate(text.entries()):
                yield Entry(index, value)
        except _Broken as error:
            raise Damaged(path, index + 1, text.offset(error.position), error.reason) from None
        except _OneObject as error:
            raise Damaged(path, 0, None, shape_of_object(error.document, path)) from None


class _Undecided(Exception):
    """More of the file must be read first."""


class _OneObject(Exception):
    """The text is one object that is not an entry."""

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__()
        self.document = document


class _Broken(Exception):
    """The text is not complete JSON. `position` is an index into the buffered text."""

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
        return Decimal("NaN")  # an exponent beyond Decimal's range; no field accepts NaN


def _is_archive(value: Any) -> bool:
    return is_entry(value) and any(isinstance(value.get(name), list) for name in ("signals", "signals_data"))


def _may_have_entries(member: Any) -> bool:
    return has_objects(member) or (is_entry(member) and "balance" in member)


_DECODER = json.JSONDecoder(parse_float=Decimal)
_LENIENT_DECODER = json.JSONDecoder(parse_float=_number, parse_int=_number)


def _decode(text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except (ArithmeticError, ValueError):  # a number that int() or Decimal() rejects
        return _LENIENT_DECODER.raw_decode(text, position)


class _Text:
    """Buffered text of the file, which moves forward element by element."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None] | None) -> None:
        self._file = file
        self._progress = progress
        # A byte that is not UTF-8 becomes a lone surrogate, which makes one entry invalid and not the rest of the file.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self._position = 0
        self._passed_bytes = 0  # bytes of the file before the buffered text
        self._read_bytes = 0
        self._ended = False

    def offset(self, position: int) -> int:
        """Return the offset in the file of a position in the buffered text."""
        return self._passed_bytes + len(self._text[:position].encode("utf-8", "surrogateescape"))

    def entries(self) -> Iterator[Any]:
        mark = self._next()
        if mark not in ("[", "{"):
            raise self._broken("is not a JSON array" if mark else f"is empty: {_IF_EMPTY}")
        in_objects = mark == "{" and self._array_in_object() is not None
        if mark == "{" and not in_objects:
            yield self._first_entry()
        while mark := self._next():
            if mark == ",":
                self._position += 1
            elif mark == "[":
                yield from self._array()
            elif mark == "{":
                yield from self._object() if in_objects else [self._element()]
            else:
                raise self._broken("has data that is not an entry: correct or delete it")

    def _first_entry(self) -> Any:
        value = self._element()
        if not is_entry(value) and not self._next():
            raise _OneObject(value)
        return value

    def _array(self) -> Iterator[Any]:
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

    def _object(self) -> Iterator[Any]:
        """Yield the entries of an object with an array of them, or the object itself if it has none."""
        array = self._array_in_object()
        if array is None:
            yield self._element()
            return
        self._position = array
        yield from self._array()
        self._read_other_members()

    def _array_in_object(self) -> int | None:
        """Return the position of the array of entries in the object that begins here; None if it has none."""
        size = HEAD_BYTES
        while True:
            while len(self._text) - self._position < size and not self._ended:
                self._read_more(_BLOCK_BYTES)
            try:
                return self._find_array()
            except (json.JSONDecodeError, RecursionError):
                return None
            except _Undecided:
                if self._ended or size > _MOST_CHARACTERS:
                    return None
            size *= 2

    def _find_array(self) -> int | None:
        """Like _array_in_object. Raises _Undecided if the result depends on text that is not buffered yet."""
        position: int = self._position + 1
        while (name := _NAME.match(self._text, position)) is not None:
            if name[1] == "archived_at":
                return None  # the object is an archive, and its signals may be like entries
            array = _ARRAY.match(self._text, name.end()) if name[1] in _ARRAYS else None
            if array is not None and (name[1] != "signals" or _is_archive(self._decode_ahead(array.end())[0])):
                return name.end()
            value, end = self._decode_ahead(name.end())
            comma = _COMMA.match(self._text, end)
            if comma is None or _may_have_entries(value):
                return None
            position = comma.end()
        if self._is_near_end(position):
            raise _Undecided
        return None

    def _decode_ahead(self, position: int) -> tuple[Any, int]:
        """Return the value at `position` and its end. Raises _Undecided if the buffered text may end inside of it."""
        try:
            value, end = _decode(self._text, position)
        except json.JSONDecodeError as error:
            if self._is_near_end(error.pos) or error.msg.startswith(_OPEN_STRING):
                raise _Undecided from None
            raise
        if not self._text[end:].strip(_BLANKS):
            raise _Undecided
        return value, end

    def _is_near_end(self, position: int) -> bool:
        return position + _TORN_CHARACTERS >= len(self._text)

    def _read_other_members(self) -> None:
        """Read to the end of the object. Objects in its other members may be entries too."""
        while (mark := self._next()) == ",":
            self._position += 1
            name = self._element() if self._next() == '"' else None
            if self._next() != ":":
                raise self._broken(
                    "is not JSON: a member of the object is incomplete" if self._next() else "is cut off"
                )
            self._position += 1
            if _may_have_entries(self._element()):
                member = readable(str(name), 40)
                raise self._broken(
                    f"has more objects in '{member}', which were not read: import them from a separate folder"
                )
        if mark != "}":
            raise self._broken("is not JSON: a comma or } is missing" if mark else "is cut off")
        self._position += 1

    def _next(self) -> str:
        """Return the next character that is not blank, without consuming it; "" at the end of the file."""
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
                if not self._is_near_end(error.pos) and not error.msg.startswith(_OPEN_STRING):
                    raise _Broken(error.pos, f"is not JSON: {error.msg}") from None
                if self._ended:
                    raise self._error_at_the_end(error) from None
            except RecursionError:
                raise self._broken("is nested too deeply") from None
            else:
                # A number at the end of the buffer may be incomplete, as 1 is in 1.5 and 1e+5: it needs a character
                # after it that does not belong to a number.
                if self._ended or _NOT_OF_NUMBER.search(self._text, end):
                    self._position = end
                    return value
            if len(self._text) - self._position > _MOST_CHARACTERS:
                raise self._broken(f"has an entry of more than {_MOST_CHARACTERS // 2**20} million characters")
            self._read_more(size)
            size *= 2

    def _error_at_the_end(self, error: json.JSONDecodeError) -> _Broken:
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


def write_entries(path: Path, entries: Iterable[Mapping[str, Any]]) -> int:
    """Write `entries` as one JSON array and return their number.

    When this returns, the file is complete and on disk. If it raises or the process dies, `path` is unchanged; only a
    killed process leaves a hidden `.<name>.<random>.tmp` beside it. Each entry is one line. Decimals are written as
    numbers with every digit, and all text is ASCII, so that a reader's encoding makes no difference.

    Raises:
        FileNotWritten: the file cannot be written: the disk is full, the folder does not exist, and the like.
        ValueError: an entry contains a value that JSON does not have, such as NaN.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        try:
            with temporary.open("x", encoding="ascii", newline="\n") as file:
                count = 0
                for count, entry in enumerate(entries, start=1):
                    file.write(("[\n" if count == 1 else ",\n") + _line(entry))
                file.write("\n]\n" if count else "[]\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise FileNotWritten(path, error) from error
    return count


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable. Raises OSError if that fails."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(entry: Mapping[str, Any]) -> str:
    line: str = _ENTRY_ENCODER.encode(entry)
    # Characters beyond ASCII occur only in strings, where an escape has the same meaning.
    return line if line.isascii() else _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], line)
