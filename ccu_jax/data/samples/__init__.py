"""Writers of small editions in the official formats, one file each.

All content is invented or clip art: good for trying everything out, and for showing
that a method works; a score on it says nothing about the real data set. `sample.py`
beside this folder is the command.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from ccu_jax.data.readers.base import Progress


class Trap(NamedTuple):
    """Something planted that the real files have, and how a loader must count it."""

    trap: str  # what it is, in words
    where: str  # file, or file and line, or the row's id
    counted: str | None  # a key of `Counts.numbers`; None: it must change no count
    number: int = 1


class Writer(NamedTuple):
    """How the sample edition of one data set is written.

    `write(root, rows, seed, progress)` fills the new folder `root`; the same arguments
    give the same bytes. `plant(root, seed)` adds the traps to what `write` has written
    and lists them, together with everything else that a loader counts there.
    """

    version: int  # raised whenever the written files change
    what: str  # what its rows are, as in "30 movies"
    least: int  # smallest number of rows
    write: Callable[[pathlib.Path, int, int, Progress], None]
    plant: Callable[[pathlib.Path, int], list[Trap]] | None = None
