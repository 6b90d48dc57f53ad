"""What a reader of a data set gives: undecoded examples, and what it left out."""

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ccu_jax.config.schema import Data
from ccu_jax.errors import UserError

SPLITS = ("train", "validation", "test")
MARKER = "SYNTHETIC.txt"  # a file of this name tells a sample edition from the real one

Progress = Callable[[str, int, int], None]
Unpack = Callable[[pathlib.Path], pathlib.Path]


class SkipExample(Exception):
    """A row or picture that cannot be used; the message is the reason to count."""


class Example(NamedTuple):
    """One row as it lies on the disk; nothing is decoded yet."""

    id: str  # unique in the data set, and the same in every edition of it
    group: str  # rows that must be forgotten together
    image: bytes | None  # an encoded picture, as the file holds it
    text: str | None
    labels: tuple[str, ...]
    split: str  # one of SPLITS
    notes: tuple[str, ...] = ()  # worth counting, but no reason to leave the row out


class Location(NamedTuple):
    """Where the files of a data set were found."""

    root: pathlib.Path
    edition: str  # "official", "sample", "clipart" or "own"


class Source(NamedTuple):
    """An opened data set: its classes and its rows, which can be read in any order."""

    classes: tuple[str, ...]
    multi_label: bool
    metric: (
        str  # the score that tables lead with: a key of `metrics.classification` scores
    )
    keys: Sequence[Any]  # what `read` takes, one a row; small, and always the same
    # A pure function that several threads call at once; raises SkipExample.
    read: Callable[[Any], Example]
    row_name: Callable[[Any], str] = str  # what messages call a row


class Counts:
    """How many rows were read, used, and left out for which reason."""

    def __init__(self, what: str, strict: bool):
        """Counts rows of `what` (for messages); `strict` turns skips into errors."""
        self.what = what
        self.strict = strict
        self.numbers: dict[str, int] = {}

    def add(self, name: str, number: int = 1) -> None:
        """Adds to a number that is worth telling but is no loss of a row."""
        if number:
            self.numbers[name] = self.numbers.get(name, 0) + number

    def skip(self, reason: str, row: str) -> None:
        """Counts a row that cannot be used.

        Raises:
            UserError: if every row must be usable (`strict`).
        """
        if self.strict:
            raise UserError(
                f"{self.what}: {row}: {reason} (data.strict is on: mend or remove the "
                "row, or set data.strict=False to leave such rows out)"
            )
        self.add(f"skipped: {reason}")

    def no_rows_error(self) -> UserError:
        """The error for a data set without one usable row."""
        told = ", ".join(f"{number} {name}" for name, number in self.numbers.items())
        return UserError(f"{self.what}: no usable row left ({told or 'it is empty'})")


class Reader(NamedTuple):
    """A row of DATASETS: how to find, recognise and read one kind of data set."""

    # Finds the files; raises UserError if they are missing. Without `data.dir` it
    # names the place of the sample edition, which may not be written yet.
    locate: Callable[[Data, pathlib.Path], Location]
    # A cheap mark of the files' state, to notice that they have changed.
    signature: Callable[[Data, Location], str]
    # Reads indexes, not pictures. `Unpack` gives the folder that an archive in the
    # place was unpacked to; what is skipped or noted here is counted in `Counts`.
    open: Callable[[Data, Location, Counts, Unpack], Source]


def digest(*parts: str | bytes) -> str:
    """A short hash of texts and bytes; where one part ends matters."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()


def hash_fraction(*parts: str) -> float:
    """A number in [0, 1) that goes by the texts alone: the same for ever."""
    return int(digest(*parts)[:12], 16) / 16**12
