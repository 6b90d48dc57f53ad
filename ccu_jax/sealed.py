"""Records that tell whether they were damaged: plain JSON with a digest of its own.

A flipped bit in a number leaves valid JSON, and another number.
"""

import hashlib
import json
from typing import Any

_NAME = "sha256"


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


def _digest(plain):
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
