"""The label files of Fashion200k: their names and rows."""

import pathlib
import re
from typing import NamedTuple

from ccu_jax.data.readers.base import Counts, SkipExample
from ccu_jax.data.readers.untrusted_files import decode_utf8, iter_lines

CATEGORIES = ("dress", "jacket", "pants", "skirt", "top")
FOLDERS = {
    "dresses": "dress",
    "jackets": "jacket",
    "pants": "pants",
    "skirts": "skirt",
    "tops": "top",
}
_SUB_CATEGORIES = {
    "dress": """
        cocktail_dresses prom_and_formal_dresses mini_and_short_dresses
        casual_and_day_dresses maxi_and_long_dresses gowns
    """,
    "jacket": """
        casual_jackets leather_jackets waistcoats_and_gilets padded_and_down_jackets
        blazers_and_suit_jackets denim_jackets fur_jackets
    """,
    "pants": """
        leggings wide-leg_and_palazzo_pants cropped_pants skinny_pants
        straight-leg_pants full_length_pants harem_pants cargo_pants
    """,
    "skirt": "mid_length_skirts mini_skirts knee_length_skirts maxi_skirts",
    "top": """
        long_sleeved_tops short_sleeve_tops shirts sleeveless_and_tank_tops t-shirts
        blouses
    """,
}
SUB_CATEGORIES = {
    category: tuple(names.split()) for category, names in _SUB_CATEGORIES.items()
}
# Category and split of each label file, in the order in which rows are read.
LABEL_FILES = {
    f"{category}_{split}_detect_all.txt": (category, split)
    for category in CATEGORIES
    for split in ("test", "train")
}
# Nothing in it can lead out of a folder. The lengths are bounded because all ids are
# stored in as many characters as the longest one; official paths are far shorter.
_PATH = re.compile(
    rf"women/({'|'.join(FOLDERS)})/([A-Za-z0-9_-]{{1,80}})/([0-9]{{1,20}})/"
    r"[A-Za-z0-9_-]{1,80}\.jpeg"
)


class Row(NamedTuple):
    """A checked line of a label file."""

    where: str  # file and line
    path: str  # of the image, below the root
    category: str
    sub_category: str
    product: str
    title: str
    split: str  # "train" or "test"


def read_rows(
    labels: pathlib.Path, counts: Counts, only_known_sub_categories: bool
) -> tuple[list[Row], set[str]]:
    """Returns the usable rows of all label files, and the paths of all listed images.

    `labels` is their folder.
    """
    rows, paths = [], set()
    for name, (category, split) in LABEL_FILES.items():
        for line, raw in iter_lines(labels / name):
            if raw is not None and not raw.strip():
                continue
            counts.add("read")
            where = f"{name} line {line}"
            try:
                row = _parse_row(where, raw, category, split)
                if row.path in paths:
                    raise SkipExample("path listed twice")
                paths.add(row.path)
                is_known = row.sub_category in SUB_CATEGORIES[category]
                if only_known_sub_categories and not is_known:
                    raise SkipExample("sub-category unknown")
            except SkipExample as reason:
                counts.skip(str(reason), where)
            else:
                rows.append(row)
    return rows, paths


def _parse_row(where: str, raw: bytes | None, category: str, split: str) -> Row:
    if raw is None:
        raise SkipExample("line too long")
    columns = decode_utf8(raw, "line").split("\t")
    if len(columns) != 3:
        raise SkipExample("row has the wrong number of columns")
    path, _, title = columns
    match = _PATH.fullmatch(path)
    if not match:
        raise SkipExample("path is not of the known form")
    if FOLDERS[match[1]] != category:
        raise SkipExample("path is of another category than the label file")
    return Row(where, path, category, match[2], match[3], title, split)
