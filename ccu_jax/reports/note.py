"""A sentence of the report."""

from typing import NamedTuple


class Note(NamedTuple):
    """A sentence below the table; kind: "loud", "note", "yes" or "no"."""

    kind: str
    text: str
