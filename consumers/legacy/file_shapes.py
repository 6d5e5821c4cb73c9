"""Name the shape of a file that is not an array of entries, and the command that converts it."""

from __future__ import annotations

import codecs
import shlex
from decimal import Decimal
from pathlib import Path
from typing import Any

from producers.fields import readable

HEAD_BYTES = 4096
ENTRY_TIMES = ("timestamp", "archived_at")  # an entry has one of them

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -c"),
    b"BZh": ("bzip2", "bunzip2 -c"),
    b"\xfd7zXZ\0": ("xz", "unxz -c"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd -c"),
    b"PK\x03\x04": ("zip", "unzip -p"),
}
# UTF-32 first: its little-endian mark begins with the one of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Which of the first four bytes are zero, if JSON is written in these encodings without a mark (RFC 4627, section 3).
_ZEROS = {
    (True, True, True, False): "UTF-32BE",
    (False, True, True, True): "UTF-32LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, False, True): "UTF-16LE",
}
_SHOWN_KEYS = 5
_DATE_DIGITS = 8  # as in 20260501; numbers of portfolios have fewer

_FROM_CSV = (
    'import csv, json, sys; rows = csv.DictReader(open(sys.argv[1], encoding="utf-8-sig", newline=""),'
    r' delimiter=sys.argv[2].replace("\\t", "\t")); json.dump(list(rows), sys.stdout)'
)
_FROM_LISTS = (
    'import json, sys; columns = json.load(open(sys.argv[1], "rb"));'
    " json.dump([dict(zip(columns, row)) for row in zip(*columns.values())], sys.stdout)"
)
_FROM_OBJECTS = (
    'import json, sys; columns = json.load(open(sys.argv[1], "rb"));'
    " json.dump([dict(zip(columns, row)) for row in zip(*(c.values() for c in columns.values()))], sys.stdout)"
)
_FROM_SPLIT = (
    'import json, sys; table = json.load(open(sys.argv[1], "rb"));'
    ' json.dump([dict(zip(table["columns"], row)) for row in table["data"]], sys.stdout)'
)
_FROM_VALUES = 'import json, sys; json.dump(list(json.load(open(sys.argv[1], "rb")).values()), sys.stdout)'
_FROM_ARRAYS = 'import json, sys; json.dump(sum(json.load(open(sys.argv[1], "rb")).values(), []), sys.stdout)'
_FROM_PORTFOLIOS = (
    'import json, sys; portfolios = json.load(open(sys.argv[1], "rb"));'
    ' json.dump([{"portfolio_id": key, **entry} for key, entries in portfolios.items() for entry in entries],'
    " sys.stdout)"
)
_FROM_SIGNALS = (
    'import json, sys; signals = json.load(open(sys.argv[1], "rb"))["signals"];'
    ' json.dump([{"archived_at": sys.argv[2], "signals": signals}], sys.stdout)'
)
# Without the name of the array, which may have characters that no terminal shows.
_FROM_MEMBER = (
    'import json, sys; members = json.load(open(sys.argv[1], "rb")).values();'
    " json.dump(next(one for one in members if one and isinstance(one, list)), sys.stdout)"
)


def shape_of_bytes(head: bytes, path: Path) -> str | None:
    """Return a message if a file that begins with `head` cannot contain JSON as UTF-8; None if it may.

    The message says which shape it is and how to convert it.
    """
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            return _to_convert(f"is compressed with {name}", command, path)
    if len(head) >= 4 and not any(head):
        return "begins with zero bytes, as after a power failure: restore it from a backup"
    encoding = _encoding(head)
    if encoding is not None:
        return _to_convert(f"is text in {encoding}, not UTF-8", f"iconv -f {encoding} -t UTF-8", path)
    return _shape_of_text(head.decode("utf-8-sig", "replace").strip(), path)


def _encoding(head: bytes) -> str | None:
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    return _ZEROS.get(tuple(byte == 0 for byte in head[:4]))  # type: ignore[arg-type]  # a shorter file is not found


def _shape_of_text(text: str, path: Path) -> str | None:
    if text.startswith("<"):
        return "is an HTML or XML page, not JSON, such as the error page of a web server: fetch the file again"
    lines = text.splitlines()[:2]
    delimiter = max(",;\t", key=text.count)
    if text.startswith(("[", "{")) or len(lines) < 2 or not all(delimiter in line for line in lines):
        return None
    return _to_convert("is CSV, not JSON", _python(_FROM_CSV), path, delimiter.replace("\t", r"\t"))


def shape_of_object(document: Any, path: Path) -> str:
    """Return a message for a file with one JSON object that is not an entry: its shape, and how to convert it."""
    found = _known_shape(document, path)
    if found is not None:
        return found
    values = list(document.values())
    if len(values) > 1 and _are_columns(values, list):
        return _to_convert("has one array for each field, not one object for each entry", _python(_FROM_LISTS), path)
    if any(name in document for name in ENTRY_TIMES) and _are_columns(values, dict):
        return _to_convert("is stored by column (one object per field), not by entry", _python(_FROM_OBJECTS), path)
    arrays = [name for name, value in document.items() if isinstance(value, list) and value]
    if len(arrays) == 1:
        shape = f"is an object with an array in {_shown(arrays[0])}, not an array of entries"
        return _to_convert(shape, _python(_FROM_MEMBER), path)
    more = len(document) - _SHOWN_KEYS
    keys = ", ".join(_shown(name) for name in list(document)[:_SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
    return (
        f"is one object (its keys are {keys or '(none)'}), not an array of entries: write the entries as [{{…}}, {{…}}]"
    )


def _known_shape(document: dict[str, Any], path: Path) -> str | None:
    values = list(document.values())
    if isinstance(document.get("columns"), list) and isinstance(document.get("data"), list):
        shape = "has the names of the fields in 'columns' and their values in 'data'"
        return _to_convert(shape, _python(_FROM_SPLIT), path)
    if values and all(map(is_entry, values)):
        return _to_convert("has one entry under each key", _python(_FROM_VALUES), path)
    if values and all(isinstance(value, list) and value and all(map(is_entry, value)) for value in values):
        return _arrays_under_keys(document, path)
    if has_objects(document.get("signals")):
        shape = "has signals, but not the time when they were archived"
        advice = "Convert it, with their time in place of TIME"
        return _to_convert(shape, _python(_FROM_SIGNALS), path, "TIME", advice=advice)
    return None


def _arrays_under_keys(document: dict[str, Any], path: Path) -> str:
    if all(key.isdecimal() and len(key) < _DATE_DIGITS for key in document):
        shape = "has one array of entries under the number of each portfolio"
        return _to_convert(shape, _python(_FROM_PORTFOLIOS), path)
    return _to_convert("has one array of entries under each key", _python(_FROM_ARRAYS), path)


def is_entry(value: Any) -> bool:
    """Return whether a value looks like an entry: an object with one of their times."""
    times = [value.get(name) for name in ENTRY_TIMES] if isinstance(value, dict) else []
    return any(isinstance(time, str | int | float | Decimal) for time in times)


def has_objects(value: Any) -> bool:
    """Return whether an object is inside `value`, at any depth."""
    left = [value]
    while left:
        one = left.pop()
        inner = list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
        if any(isinstance(item, dict) for item in inner):
            return True
        left += [item for item in inner if isinstance(item, list)]
    return False


def _are_columns(values: list[Any], kind: type[list[Any]] | type[dict[str, Any]]) -> bool:
    of_one_kind = all(isinstance(value, kind) and not isinstance(next(iter(value), None), dict) for value in values)
    return of_one_kind and len({len(value) for value in values}) == 1


def _shown(name: str) -> str:
    return f"'{readable(name, 40)}'"


def _python(program: str) -> str:
    return f"python3 -c {shlex.quote(program)}"


def _to_convert(
    shape: str, command: str, path: Path, argument: str | None = None, *, advice: str = "Convert it"
) -> str:
    last = "" if argument is None else f" {shlex.quote(argument)}"
    old, new = shlex.quote(str(path)), shlex.quote(f"{path}.new")
    return f"{shape}. {advice}: {command} {old}{last} > {new} && mv {new} {old}"
