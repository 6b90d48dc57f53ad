"""JSON records and text files with a SHA-256 checksum of their own content.

A flipped bit in a number leaves valid JSON with another number: a checksum detects it.
"""

import hashlib
import json
import pathlib
from typing import Any

_KEY = "sha256"
_LINE_PREFIX = "# sha256 of all above: "


def add_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record after a JSON round trip, with its checksum added."""
    plain = json.loads(json.dumps(record))
    return plain | {_KEY: _checksum(plain)}


def verify_checksum(record: Any) -> dict[str, Any]:
    """Verifies the checksum of a record and returns the record without it.

    Raises ValueError if the checksum is missing or does not match.
    """
    if not isinstance(record, dict) or not isinstance(record.get(_KEY), str):
        raise ValueError("record has no checksum")
    plain = {name: value for name, value in record.items() if name != _KEY}
    if record[_KEY] != _checksum(plain):
        raise ValueError("record does not match its checksum")
    return plain


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON record and returns it without its checksum.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or `verify_checksum` rejects it.
    """
    try:
        return verify_checksum(json.loads(path.read_text(encoding="utf-8")))
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def add_line_checksum(text: str) -> str:
    """Appends a line with the checksum of `text`, which must end with a newline."""
    return f"{text}{_LINE_PREFIX}{hashlib.sha256(text.encode()).hexdigest()}\n"


def has_valid_checksum(text: str) -> bool:
    """Returns whether the checksum in the last line matches the lines before it."""
    content, prefix, _ = text.rpartition(_LINE_PREFIX)
    return prefix != "" and text == add_line_checksum(content)


def _checksum(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
