"""What others wrote, for a terminal: reasons, names and events may have what would steer it."""

from __future__ import annotations

import json
import re
import unicodedata

_NOT_PLAIN = re.compile(r"[^ -~]")
_JOINERS = "\u200c\u200d"  # of letters, and of pictures


def printable(text: str) -> str:
    """One line of `text`, with a mark for each character that is no letter, sign or space of any language."""
    return _NOT_PLAIN.sub(lambda found: found[0] if _is_harmless(found[0]) else "�", text)


def escaped(text: str) -> str:
    """`text` in its lines, other such characters as escapes of JSON: what was JSON says the same."""
    return _NOT_PLAIN.sub(
        lambda found: found[0] if found[0] in "\n\t" or _is_harmless(found[0]) else json.dumps(found[0])[1:-1], text
    )


def _is_harmless(character: str) -> bool:
    # The spaces of other alphabets, which are not "printable" to Python.
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"
