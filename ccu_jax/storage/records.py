"""Records that tell whether they were damaged: plain JSON with a digest of its own.

A flipped bit in a number leaves valid JSON, and another number. Lists for people to
read have theirs in a last line.
"""

import hashlib
import json
import pathlib
from typing import Any

_NAME = "sha256"
_LAST = "# sha256 of all above: "


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON gives it back, with its digest."""
    plain = json.loads(json.dumps(record))
    return plain | {_NAME: _digest(plain)}


def unseal(record: Any) -> dict[str, Any]:
    """The record without the digest.

    Raises:
        ValueError: it is not what was sealed.
    """
    if not isinstance(record, dict) or not isinstance(record.get(_NAME), str):
        raise ValueError("it holds no digest of its own")
    rest = {name: value for name, value in record.items() if name != _NAME}
    if record[_NAME] != _digest(rest):
        raise ValueError("it does not match its digest")
    return rest


def read(path: pathlib.Path) -> dict[str, Any]:
    """The record in a file, without the digest.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds none, or another one than was sealed.
    """
    try:
        return unseal(json.loads(path.read_text(encoding="utf-8")))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def seal_lines(text: str) -> str:
    """The lines, which end with one, with their digest in one more."""
    return f"{text}{_LAST}{hashlib.sha256(text.encode()).hexdigest()}\n"


def whole_lines(text: str) -> bool:
    """Whether lines are what was sealed."""
    above, mark, _ = text.rpartition(_LAST)
    return mark != "" and text == seal_lines(above)


def _digest(plain):
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
