r"""Fashion200k (Han et al., 2017) in its official layout: clothes and their titles.

    labels/<category>_<train or test>_detect_all.txt    path \t score \t title
    women/<category>s/<sub-category>/<product>/<product>_<n>.jpeg     or women.tar.gz

Get it from https://github.com/xthan/fashion-200k ; this module downloads nothing.
"""

import collections
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ccu_jax.config.schema import Data
from ccu_jax.data.readers import base
from ccu_jax.data.readers.base import Counts, Example, SkipExample
from ccu_jax.data.readers.releases import Release
from ccu_jax.data.readers.untrusted_files import Folder, decode_line, iter_lines
from ccu_jax.errors import UserError

PAGE = "https://github.com/xthan/fashion-200k"
ARCHIVE = "women.tar.gz"
CATEGORIES = ("dress", "jacket", "pants", "skirt", "top")
_PLURALS = ("dresses", "jackets", "pants", "skirts", "tops")
FOLDERS = dict(zip(_PLURALS, CATEGORIES, strict=True))
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
# No match leads out of the folder. The lengths are bounded because all ids are stored
# in as many characters as the longest one; official paths are far shorter.
_PATH = re.compile(
    rf"women/({'|'.join(FOLDERS)})/([A-Za-z0-9_-]{{1,80}})/([0-9]{{1,20}})/"
    r"[A-Za-z0-9_-]{1,80}\.jpeg"
)

# The character that a continuation byte of UTF-8 (0x80 to 0x9F) became when it was read
# as Windows-1252. Read as Latin-1, every byte keeps its value.
_WINDOWS = {
    bytes([byte]).decode("cp1252"): byte
    for byte in range(0x80, 0xA0)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)  # undefined
}
_CONTINUATION = "[\u0080-\u00bf" + "".join(_WINDOWS) + "]"
# The titles were lowercased afterwards, so the first byte may be 0x20 too high.
# "\u00e4" and "\u00e5" count as such a byte only before a control character: before
# others they are far more often letters.
_DOUBLE_ENCODED = re.compile(
    f"\u00e2{_CONTINUATION}{{2}}|[\u00c2\u00c3\u00e2\u00e3]{_CONTINUATION}"
    "|[\u00c4\u00c5\u00e4\u00e5][\u0080-\u009f]"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LETTER = re.compile(r"[^\W_]")
_TIRG_WORDS = {".": "dotmark", "?": "questionmark", "&": "andmark", "*": "starmark"}


class Row(NamedTuple):
    """A validated line of a label file."""

    where: str  # file and line
    path: str  # of the image, below the root
    category: str
    sub_category: str
    product: str
    title: str
    split: str  # "train" or "test"


def open_fashion200k(
    config: Data, location: base.Location, counts: Counts, unpack: base.Unpack
) -> base.Source:
    """Opens Fashion200k; raises UserError if none of the listed images exists."""
    root, is_sub_task = location.root, config.task == "sub_category"
    images = RELEASE.unpack_images(root, counts, unpack)
    rows, listed = _read_rows(root / "labels", counts, is_sub_task)
    num_ambiguous = base.count_ambiguous((row.product, row.split) for row in rows)
    counts.add("noted: product in two splits", num_ambiguous)
    is_listed = collections.Counter(path in listed for path in _iter_images(images))
    if listed and not is_listed[True]:
        raise UserError(
            f"data.dir: {root} has none of the images listed in labels/: unpack "
            f"{ARCHIVE} there, see {PAGE}"
        )
    counts.add("ignored: image that no label file lists", is_listed[False])
    folder, classes, masked_words = Folder(images), CATEGORIES, None
    if is_sub_task:
        classes = tuple(name for names in SUB_CATEGORIES.values() for name in names)
    if config.mask_category_words:
        masked_words = compile_class_words({*CATEGORIES, *classes})

    def read(row: Row) -> Example:
        image = folder.read(row.path.removeprefix("women/"), "image")
        title, notes = clean_title(row.title, masked_words, config.tirg_dot_token)
        fraction = base.hash_fraction("validation", row.product)
        is_validation = row.split == "train" and fraction < config.validation_fraction
        split = "validation" if is_validation else row.split
        id_ = row.path.removesuffix(".jpeg")
        labels = (row.sub_category if is_sub_task else row.category,)
        return Example(id_, row.product, image, title, labels, split, notes)

    return base.Source(classes, False, "accuracy", rows, read, lambda row: row.where)


def _iter_images(folder: pathlib.Path) -> Iterator[str]:
    """Yields the paths of all images as the label files write them: `women/...`."""
    for above, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(f"{above}/{name}")]
        for name in names + links:
            if name.endswith(".jpeg"):
                yield f"women{above[len(str(folder)) :]}/{name}"


def _read_rows(
    labels: pathlib.Path, counts: Counts, only_known_sub_categories: bool
) -> tuple[list[Row], set[str]]:
    """Returns the usable rows of all label files, and all listed image paths."""
    rows, paths = [], set()
    for name, (category, split) in LABEL_FILES.items():
        for line, raw in iter_lines(labels / name):
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
    """Validates a line of a label file; raises SkipExample."""
    columns = decode_line(raw).split("\t")
    if len(columns) != 3:
        raise SkipExample("row has the wrong number of columns")
    path, _, title = columns
    match = _PATH.fullmatch(path)
    if not match:
        raise SkipExample("path is not of the known form")
    if FOLDERS[match[1]] != category:
        raise SkipExample("path is of another category than the label file")
    return Row(where, path, category, match[2], match[3], title, split)


def clean_title(
    raw: str, masked_words: re.Pattern[str] | None = None, tirg: bool = False
) -> tuple[str | None, tuple[str, ...]]:
    """Repairs the encoding of a title; removes control characters and masked words.

    Args:
        raw: the title in the label file.
        masked_words: words to remove, from `compile_class_words`.
        tirg: whether punctuation becomes words, as in TIRG (Vo et al., 2019).

    Returns:
        The title, or None if it is empty, and notes to count.
    """
    notes = []
    title = raw
    for _ in range(3):  # some titles were encoded more than twice
        title = _DOUBLE_ENCODED.sub(_decode_match, title)
    if title != raw:
        notes.append("noted: doubly encoded title")
    spaced = _CONTROL.sub(" ", title)
    if spaced != title:
        notes.append("noted: control characters in a title")
    words = spaced.split()
    if not words:
        notes.append("noted: empty title")
    if not spaced.isascii():
        notes.append("noted: non-ASCII title")
    if masked_words and words:
        words = _remove_masked_words(words, masked_words)
        if not words:
            notes.append("noted: title with nothing but masked words")
    title = " ".join(words)
    if tirg:
        title = title.translate(str.maketrans(_TIRG_WORDS))
    return title or None, tuple(notes)


def compile_class_words(names: Iterable[str]) -> re.Pattern[str]:
    """Compiles a pattern that matches the words of class names, singular and plural.

    Args:
        names: class names such as "dress" or "long_sleeved_tops". If the last word of a
            name has more than three letters, it also matches as the end of a longer
            word, such as "sundress".
    """
    exact, endings = set(), set()
    for name in names:
        *modifiers, noun = (_to_singular(word) for word in re.split("[_-]", name))
        exact.update(word for word in modifiers if word != "and")
        (endings if len(noun) > 3 else exact).add(noun)
    words = [*(rf"\w*{word}" for word in sorted(endings)), *sorted(exact)]
    return re.compile(
        rf"(?<!\w)(?:{'|'.join(words)})(?:e?s)?(?:['\u2019]s)?(?!\w)", re.IGNORECASE
    )


def _decode_match(match: re.Match[str]) -> str:
    """Repairs a doubly encoded character, or returns it unchanged."""
    data = bytes(_WINDOWS.get(character) or ord(character) for character in match[0])
    if len(data) == 2 and data[0] >= 0xE0:
        data = bytes([data[0] - 0x20, data[1]])
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return match[0]
    return text.lower() if match[0].islower() else text


def _to_singular(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _remove_masked_words(words: list[str], masked: re.Pattern[str]) -> list[str]:
    """Removes the masked parts of words, and words without a remaining letter."""
    remaining = []
    for word in words:
        rest = masked.sub("", word)
        if rest != word:  # "v-neck-top" becomes "v-neck" and "top." becomes ""
            # A pattern with "$" would take hours for many punctuation marks in a row.
            letters = [match.start() for match in _LETTER.finditer(rest)]
            rest = rest[letters[0] : letters[-1] + 1] if letters else ""
        if rest:
            remaining.append(rest)
    return remaining


RELEASE = Release(
    title="Fashion200k",
    remedy=f"get it from {PAGE}",
    sample_root="fashion200k",
    lists=tuple(f"labels/{name}" for name in LABEL_FILES),
    image_folders=("women",),
    image_archives=(ARCHIVE,),
    subfolders=("fashion-200k", "fashion200k"),
    inner_folders=("labels", "women", "detection"),
    watched_depth=2,  # excludes the about 70,000 product folders
)
READER = base.Reader(RELEASE.locate, RELEASE.compute_signature, open_fashion200k)
