"""The interface of readers: where a data set lies, its examples, and counts."""

import collections
import hashlib
import pathlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from ccu_jax.config.schema import Data
from ccu_jax.errors import UserError

SPLITS = ("train", "validation", "test")
MARKER = "SYNTHETIC.txt"  # a file of this name marks a folder as a sample edition
CLIPART = pathlib.Path(__file__).parents[1] / "clipart"  # pairs in the package

Progress = Callable[[str, int, int], None]
Unpack = Callable[[pathlib.Path], pathlib.Path]


class SkipExample(Exception):
    """A row or image cannot be used; the message is the reason to count."""


class Example(NamedTuple):
    """One row as it is stored on disk; the image is not decoded yet."""

    id: str  # unique in the data set, and the same in every edition of it
    group: str  # rows of a group are forgotten together
    image: bytes | None  # an encoded image, as the file holds it
    text: str | None
    labels: tuple[str, ...]
    split: str  # one of SPLITS
    notes: tuple[str, ...] = ()  # keys to count; the row is used nevertheless


class Location(NamedTuple):
    """Where the files of a data set lie."""

    root: pathlib.Path
    edition: str  # "official", "sample", "clipart" or "own"


class Source(NamedTuple):
    """An opened data set: its classes, and its rows, which can be read in any order."""

    classes: tuple[str, ...]
    multi_label: bool
    metric: str  # the score that tables show first: a key of `evaluate.scores`
    keys: Sequence[Any]  # one argument of `read` per row; small, in a fixed order
    read: Callable[[Any], Example]  # thread-safe; raises SkipExample
    row_name: Callable[[Any], str] = str  # the name of a key's row in messages


class Counts:
    """Counts rows that were read, and rows that were skipped for each reason.

    Args:
        origin: the folder or data set that messages name.
        strict: whether a skipped row is an error.
    """

    def __init__(self, origin: str, strict: bool):  # noqa: D107
        self.origin = origin
        self.strict = strict
        self.numbers: dict[str, int] = {}

    def add(self, name: str, number: int = 1) -> None:
        """Adds to a count; adding 0 creates no entry."""
        if number:
            self.numbers[name] = self.numbers.get(name, 0) + number

    def skip(self, reason: str, row_name: str) -> None:
        """Counts a row that cannot be used; raises UserError if `strict`."""
        if self.strict:
            raise UserError(
                f"{self.origin}: {row_name}: {reason} (data.strict is on: mend or "
                "remove the row, or set data.strict=False to leave such rows out)"
            )
        self.add(f"skipped: {reason}")

    def no_rows_error(self) -> UserError:
        """Returns the error for a data set without a usable row."""
        counts = ", ".join(f"{number} {name}" for name, number in self.numbers.items())
        return UserError(f"{self.origin}: no usable row left ({counts or 'no rows'})")


class Reader(NamedTuple):
    """An entry of DATASETS: how to find, fingerprint and read a kind of data set."""

    # Finds the files; raises UserError if they are missing. Without `data.dir` it
    # returns the location of the sample edition, which may not be written yet.
    locate: Callable[[Data, pathlib.Path], Location]
    # Returns a fingerprint that changes when files change, without reading images.
    signature: Callable[[Data, Location], str]
    # Reads lists of rows, no images. `Unpack` returns the folder that an archive in
    # the location was unpacked to; skipped rows of the lists are added to `Counts`.
    open: Callable[[Data, Location, Counts, Unpack], Source]


def digest(*parts: str | bytes) -> str:
    """Hashes texts and bytes; the boundaries between parts matter."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def digest_file(path: pathlib.Path) -> str:
    """Hashes the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def count_ambiguous(pairs: Iterable[tuple[Hashable, Hashable]]) -> int:
    """Counts the keys that occur with two or more values in pairs (key, value)."""
    num_values = collections.Counter(key for key, _ in set(pairs))
    return sum(number > 1 for number in num_values.values())


def hash_fraction(*parts: str) -> float:
    """Returns a number in [0, 1) that depends on the texts alone.

    Splits by it are the same for every order and every subset of the rows.
    """
    return int(digest(*parts)[:12], 16) / 16**12
