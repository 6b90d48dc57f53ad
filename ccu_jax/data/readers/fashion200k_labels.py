"""The label files of Fashion200k: which rows they list, and where each one stands."""

import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ccu_jax.data.readers.base import SkipExample
from ccu_jax.data.readers.untrusted_files import decode_utf8

CATEGORIES = ("dress", "jacket", "pants", "skirt", "top")
FOLDERS = {
    "dresses": "dress",
    "jackets": "jacket",
    "pants": "pants",
    "skirts": "skirt",
    "tops": "top",
}
SUB_CATEGORIES = {
    "dress": (
        "cocktail_dresses",
        "prom_and_formal_dresses",
        "mini_and_short_dresses",
        "casual_and_day_dresses",
        "maxi_and_long_dresses",
        "gowns",
    ),
    "jacket": (
        "casual_jackets",
        "leather_jackets",
        "waistcoats_and_gilets",
        "padded_and_down_jackets",
        "blazers_and_suit_jackets",
        "denim_jackets",
        "fur_jackets",
    ),
    "pants": (
        "leggings",
        "wide-leg_and_palazzo_pants",
        "cropped_pants",
        "skinny_pants",
        "straight-leg_pants",
        "full_length_pants",
        "harem_pants",
        "cargo_pants",
    ),
    "skirt": ("mid_length_skirts", "mini_skirts", "knee_length_skirts", "maxi_skirts"),
    "top": (
        "long_sleeved_tops",
        "short_sleeve_tops",
        "shirts",
        "sleeveless_and_tank_tops",
        "t-shirts",
        "blouses",
    ),
}
# In the order in which their rows are read.
LABEL_FILES = {
    f"{category}_{split}_detect_all.txt": (category, split)
    for category in CATEGORIES
    for split in ("test", "train")
}
# Nothing in it can lead out of a folder. The lengths have room to spare; they are
# bounded because a row's id is stored as long as the longest one.
_PATH = re.compile(
    rf"women/({'|'.join(FOLDERS)})/([A-Za-z0-9_-]{{1,80}})/([0-9]{{1,20}})/"
    r"[A-Za-z0-9_-]{1,80}\.jpeg"
)


class Key(NamedTuple):
    """Where a row stands; all that is kept of it."""

    file: int  # in the order of LABEL_FILES
    line: int  # from 1
    offset: int  # bytes
    length: int  # bytes


class Keys(Sequence):
    """The keys of all rows, at 17 bytes each."""

    _FORM = struct.Struct("<BIQI")

    def __init__(self) -> None:  # noqa: D107
        self._packed = bytearray()

    def append(self, key: Key) -> None:
        """Adds the key of the next row."""
        self._packed += self._FORM.pack(*key)

    def __len__(self) -> int:  # noqa: D105
        return len(self._packed) // self._FORM.size

    def __getitem__(self, index):  # noqa: D105
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        return Key(*self._FORM.unpack_from(self._packed, place * self._FORM.size))


class Row(NamedTuple):
    """A checked line of a label file."""

    path: str
    sub_category: str
    product: str
    title: str


def parsed(raw: bytes | None, category: str) -> Row:
    """The content of a line; raises SkipExample.

    Args:
        raw: from `iter_lines_with_offsets`.
        category: that of the label file.
    """
    if raw is None:
        raise SkipExample("line too long")
    columns = decode_utf8(raw.rstrip(b"\r\n"), "line").split("\t")
    if len(columns) != 3:
        raise SkipExample("row has the wrong number of columns")
    found = _PATH.fullmatch(columns[0])
    if not found:
        raise SkipExample("path is not of the known form")
    if FOLDERS[found[1]] != category:
        raise SkipExample("path is of another category than the label file")
    return Row(columns[0], found[2], found[3], columns[2])
