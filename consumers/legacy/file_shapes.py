"""Name the shape of a file that is not an array of entries, and the command that converts it."""

from __future__ import annotations

import codecs
import shlex
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
    values = list(document.values())
    if len(values) > 1 and _are_columns(values, list):
        return _to_convert("has one array for each field, not one object for each entry", _python(_FROM_LISTS), path)
    if any(name in document for name in ENTRY_TIMES) and _are_columns(values, dict):
        return _to_convert("has one object for each field, not one for each entry", _python(_FROM_OBJECTS), path)
    arrays = [name for name, value in document.items() if isinstance(value, list) and value]
    if len(arrays) == 1:
        shape = f"is an object with an array in {_shown(arrays[0])}, not an array of entries"
        return _to_convert(shape, _python(_FROM_MEMBER), path)
    more = len(document) - _SHOWN_KEYS
    keys = ", ".join(_shown(name) for name in list(document)[:_SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
    return (
        f"is one object (its keys are {keys or '(none)'}), not an array of entries: write the entries as [{{…}}, {{…}}]"
    )


def _are_columns(values: list[Any], kind: type[list[Any]] | type[dict[str, Any]]) -> bool:
    of_one_kind = all(isinstance(value, kind) and not isinstance(next(iter(value), None), dict) for value in values)
    return of_one_kind and len({len(value) for value in values}) == 1


def _shown(name: str) -> str:
    return f"'{readable(name, 40)}'"


def _python(program: str) -> str:
    return f"python3 -c {shlex.quote(program)}"


def _to_convert(shape: str, command: str, path: Path, argument: str | None = None) -> str:
    last = "" if argument is None else f" {shlex.quote(argument)}"
    return f"{shape}. Replace it by the output of: {command} {shlex.quote(str(path))}{last}"
