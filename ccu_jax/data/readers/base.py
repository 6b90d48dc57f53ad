"""The interface of data set readers: locations, examples and counts."""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from ccu_jax.config.schema import Data
from ccu_jax.errors import UserError

SPLITS = ("train", "validation", "test")
MARKER = "SYNTHETIC.txt"  # a file of this name marks a folder as a sample edition
CLIPART = pathlib.Path(__file__).parents[1] / "clipart"  # in the format of pairs

Progress = Callable[[str, int, int], None]  # called with (stage, done, total)
Unpack = Callable[[pathlib.Path], pathlib.Path]  # returns the folder of an archive


class SkipExample(Exception):
    """Raised for a row or image that cannot be used; its message is counted."""


class Example(NamedTuple):
    """A row of a data set; its image is still encoded."""

    id: str  # unique in the data set, and the same in every edition of it
    group: str  # rows of a group are unlearned together
    image: bytes | None  # the encoded image, as stored in its file
    text: str | None
    labels: tuple[str, ...]
    split: str  # one of SPLITS
    notes: tuple[str, ...] = ()  # names of counts to increase; the row is still used


class Location(NamedTuple):
    """The folder of a data set and the edition in it."""

    root: pathlib.Path
    edition: str  # "official", "sample", "clipart" or "own"


class Source(NamedTuple):
    """An opened data set, whose rows can be read in any order."""

    classes: tuple[str, ...]
    multi_label: bool
    metric: str  # the headline score, a key of `metrics.classification`
    keys: Sequence[Any]  # one argument of `read` per row; small, in a fixed order
    read: Callable[[Any], Example]  # thread-safe; raises SkipExample
    row_name: Callable[[Any], str] = str  # the name of a key's row in messages


@dataclasses.dataclass
class Counts:
    """Counts rows that were read, and rows that were skipped for each reason."""

    origin: str  # the folder or data set that messages name
    strict: bool  # whether a skipped row is an error
    numbers: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, name: str, number: int = 1) -> None:
        """Adds to a count; adding 0 creates no entry."""
        if number:
            self.numbers[name] = self.numbers.get(name, 0) + number

    def skip(self, reason: str, row_name: str) -> None:
        """Counts a row that cannot be used; raises UserError if `strict`."""
        if self.strict:
            raise UserError(
                f"{self.origin}: {row_name}: {reason} (data.strict is on: fix or "
                "remove the row, or set data.strict=False to skip such rows)"
            )
        self.add(f"skipped: {reason}")

    def no_rows_error(self) -> UserError:
        """Returns the error for a data set without a usable row."""
        counts = ", ".join(f"{number} {name}" for name, number in self.numbers.items())
        cause = counts or "no rows"
        return UserError(f"{self.origin}: no usable row left ({cause}); fix the files")


class Reader(NamedTuple):
    """The functions that locate, fingerprint and open one kind of data set."""

    # Finds the files; raises UserError if they are missing. Without `data.dir` it
    # returns the location of the sample edition, which may not be written yet.
    locate: Callable[[Data, pathlib.Path], Location]
    # Returns a fingerprint that changes when files change, without reading images.
    compute_signature: Callable[[Data, Location], str]
    # Reads the lists of rows, but no images; adds skipped rows to the counts. Calls the
    # last argument to unpack image archives.
    open: Callable[[Data, Location, Counts, Unpack], Source]


def digest(*parts: str | bytes) -> str:
    """Returns a hex digest of all parts; ("a", "b") and ("ab",) differ."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def digest_file(path: pathlib.Path) -> str:
    """Returns the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def count_ambiguous(pairs: Iterable[tuple[Hashable, Hashable]]) -> int:
    """Counts the keys with two or more distinct values in `(key, value)` pairs."""
    num_values = collections.Counter(key for key, _ in set(pairs))
    return sum(number > 1 for number in num_values.values())


def hash_fraction(*parts: str) -> float:
    """Hashes texts to a pseudo-random number in [0, 1).

    A split by this number is independent of the order and number of the rows.
    """
    return int(digest(*parts)[:12], 16) / 16**12
