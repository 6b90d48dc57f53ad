"""Pairs of an image and a text in a user's own folder.

The rows are in `pairs.jsonl`, a JSON object per line: `image` (path below the folder,
may be absent or null), `text` (likewise), `label` (a string) or `labels` (a list of
strings), and optionally `id`, `group` (rows to be unlearned together) and `split`.
Or they are in `pairs.csv` with these columns, "|" between the labels of a row. Or there
is no index and the images lie in folders named after classes, `cats/1.jpg` or
`train/cats/1.jpg`, with the text of an image in `1.txt` beside it.

Without a folder, the pairs are the clip art of the package or one of two generated
samples.
"""

import os
import pathlib
import re
from typing import Any, NamedTuple

from ccu_jax.config.schema import Data
from ccu_jax.data.readers import base, pairs_index
from ccu_jax.data.readers.base import Counts, Example, SkipExample
from ccu_jax.data.readers.pairs_index import SPLIT_NAMES, Entry
from ccu_jax.data.readers.untrusted_files import Folder, clean_text
from ccu_jax.errors import UserError

MAX_CLASSES = 10_000
_MAX_LENGTH = 512  # characters of an id, group or label
# Terminals interpret U+0080 to U+009F as control characters, and Python splits lines
# at U+2028 and U+2029.
_FORBIDDEN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Row(NamedTuple):
    """A validated row; `split` is "" if the index does not set it."""

    line: int
    id: str
    group: str
    image: str | None  # path below the root
    text: str | None
    labels: tuple[str, ...]
    split: str
    text_file: str | None  # path below the root, read instead of `text`
    notes: tuple[str, ...]


def locate(config: Data, workdir: pathlib.Path) -> base.Location:
    """Returns the user's folder, the clip art, or a sample edition below `workdir`."""
    if config.dir is not None:
        user_folder = pathlib.Path(os.path.expanduser(config.dir))
        if not user_folder.is_dir():
            raise UserError(f"data.dir: no folder {user_folder}; correct the path")
        root = pairs_index.find_root(user_folder)
        edition = "sample" if (root / base.MARKER).is_file() else "own"
        return base.Location(root, edition)
    if config.sample == "clipart":
        return base.Location(base.CLIPART, "clipart")
    return base.Location(workdir / "sample" / config.sample, "sample")


def compute_signature(config: Data, location: base.Location) -> str:
    """Hashes the index, and the modification times of a user's image folders."""
    root = location.root
    index = pairs_index.find_index(root)
    marks: list[str | bytes] = [base.digest_file(index)] if index else []
    if config.dir is not None:
        # Only folders with images: a working folder may lie below the root as well.
        folders = sorted(pairs_index.find_image_folders(root))
        marks += [_fingerprint_folder(root, name) for name in folders]
    elif location.edition != "clipart":
        marks.append((root / base.MARKER).read_bytes())
    return base.digest(*marks)


def open_pairs(
    config: Data, location: base.Location, counts: Counts, unpack: base.Unpack
) -> base.Source:
    """Reads and validates all rows of the index, and assigns missing splits."""
    del unpack  # the images of pairs are never in an archive inside the folder
    path = pairs_index.find_index(location.root)
    index_name = path.name if path else ""
    rows, multi_label = _read_rows(location.root, index_name, counts)
    classes = tuple(sorted({label for row in rows for label in row.labels}))
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{path or location.root}: {len(classes):,} distinct labels in "
            f"{len(rows):,} rows, at most {MAX_CLASSES:,} are supported; use class "
            "names as labels, and move descriptions of single rows to `text`"
        )
    rows = _fill_splits(rows, config, counts)
    keys = [row for split in base.SPLITS for row in rows if row.split == split]
    metric = "micro_f1" if multi_label else "accuracy"
    if num_ambiguous := base.count_ambiguous((row.group, row.split) for row in rows):
        if counts.strict:
            raise UserError(
                f"{path or location.root}: {num_ambiguous} groups have rows in more "
                "than one split; give each group one split, or set data.strict=False"
            )
        counts.add("noted: group with rows in two splits", num_ambiguous)
    folder = Folder(location.root)

    def read(row: Row) -> Example:
        image = folder.read(row.image, "image") if row.image else None
        text, notes = row.text, row.notes
        if row.text_file:
            text, notes = clean_text(folder.read_text(row.text_file, "text"))
        return Example(row.id, row.group, image, text, row.labels, row.split, notes)

    def format_name(row: Row) -> str:
        return _format_row_name(index_name, row.line, row.id)

    return base.Source(classes, multi_label, metric, keys, read, format_name)


def _assign_splits(rows: list[Row], fractions: dict[str, float]) -> list[Row]:
    """Assigns a split to each row that has none; a group is never divided.

    Stratified by labels. In each stratum the groups are ordered by a hash; the first
    groups go to test, the next to validation, the rest to train. Rounding errors carry
    over to the next stratum, so the fractions hold over all rows without a split.
    """
    splits = {row.group: row.split for row in reversed(rows) if row.split}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.group not in splits:
            groups.setdefault(row.group, []).append(row)
    strata: dict[tuple[str, ...], list[str]] = {}
    for group, members in groups.items():
        labels = tuple(sorted({label for row in members for label in row.labels}))
        strata.setdefault(labels, []).append(group)
    num_owed = dict.fromkeys(fractions, 0.0)  # rows
    for labels in sorted(strata):
        ordered = sorted(strata[labels], key=lambda group: base.digest("split", group))
        total = sum(len(groups[group]) for group in ordered)
        for name, fraction in fractions.items():
            num_owed[name] += fraction * total
        for group in ordered:
            size = len(groups[group])
            splits[group] = "train"
            for name, rest in num_owed.items():
                if rest >= size / 2 and rest > 0:
                    splits[group] = name
                    num_owed[name] -= size
                    break
    return [row._replace(split=row.split or splits[row.group]) for row in rows]


def _fill_splits(rows: list[Row], config: Data, counts: Counts) -> list[Row]:
    """Assigns missing splits; fills a split without rows from the training rows."""
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    if not all(row.split for row in rows):
        return _assign_splits(rows, fractions)
    named = {row.split for row in rows}
    fractions = {name: 0.0 if name in named else f for name, f in fractions.items()}
    groups_elsewhere = {row.group for row in rows if row.split != "train"}
    free = [r._replace(split="") for r in rows if r.group not in groups_elsewhere]
    splits = {row.id: row.split for row in _assign_splits(free, fractions)}
    for name in fractions:
        num_moved = sum(split == name for split in splits.values())
        counts.add(f"noted: train row taken for {name}", num_moved)
    return [row._replace(split=splits.get(row.id, row.split)) for row in rows]


def _read_rows(
    root: pathlib.Path, index_name: str, counts: Counts
) -> tuple[list[Row], bool]:
    """Returns the usable rows, and whether any row has the field `labels`."""
    rows: list[Row] = []
    multi_label, ids, shared = False, set(), {}
    for entry in pairs_index.iter_entries(root, counts):
        counts.add("read")
        try:
            row, has_labels = _parse_row(entry)
            if row.id in ids:
                raise SkipExample("id already used")
        except SkipExample as reason:
            name = _format_row_name(index_name, entry.line, _format_raw_name(entry))
            counts.skip(str(reason), name)
            continue
        ids.add(row.id)
        multi_label |= has_labels
        # Rows with the same labels share a tuple: there may be a million rows.
        rows.append(row._replace(labels=shared.setdefault(row.labels, row.labels)))
    return rows, multi_label


def _parse_row(entry: Entry) -> tuple[Row, bool]:
    """Validates an entry; returns its row and whether it has the field `labels`."""
    fields = entry.fields
    if isinstance(fields, SkipExample):
        raise fields
    image = pairs_index.to_posix(_parse_word(fields.get("image"), "image"))
    id_ = _parse_word(fields.get("id"), "id") or image
    if not id_:
        raise SkipExample("neither id nor image names the row")
    group = _parse_word(fields.get("group"), "group") or id_
    for name, value in (("id", id_), ("group", group)):
        if len(value) > _MAX_LENGTH:
            raise SkipExample(f"{name} too long")
    if f"{id_} ".startswith("# "):
        raise SkipExample("id begins as a comment in a list of ids does")
    split = _parse_word(fields.get("split"), "split").casefold()
    if split and split not in SPLIT_NAMES:
        raise SkipExample("split unknown")
    split = SPLIT_NAMES.get(split, "")
    text, notes = clean_text(_parse_string(fields.get("text"), "text"))
    labels = _parse_labels(fields)
    if not (image or text or entry.text_file):
        raise SkipExample("neither image nor text")
    sources = (image or None, text, labels, split, entry.text_file, notes)
    return Row(entry.line, id_, group, *sources), fields.get("labels") is not None


def _parse_labels(fields: dict[str, Any]) -> tuple[str, ...]:
    labels = fields.get("labels")
    if labels is None:
        if not (label := _parse_word(fields.get("label"), "label")):
            raise SkipExample("no label")
        labels = [label]
    if not isinstance(labels, list) or None in labels:
        raise SkipExample("labels are no list of strings")
    words = [_parse_word(label, "label") for label in labels]
    if any(len(word) > _MAX_LENGTH for word in words):
        raise SkipExample("label too long")
    return tuple(dict.fromkeys(word for word in words if word))


def _parse_string(value: Any, name: str) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # ids and labels are often written as numbers
    if value is not None and not isinstance(value, str):
        raise SkipExample(f"{name} is no string")
    return value


def _parse_word(value: Any, name: str) -> str:
    """Strips a string; raises SkipExample for control and other unsafe characters."""
    word = (_parse_string(value, name) or "").strip()
    if _FORBIDDEN.search(word):
        raise SkipExample(f"{name} has an impossible character")
    return word


def _format_raw_name(entry: Entry) -> str:
    """Returns the id or image of an unusable row, escaped for a message."""
    fields = {} if isinstance(entry.fields, SkipExample) else entry.fields
    name = fields.get("id") or fields.get("image")
    return ascii(name)[1:-1][:80] if isinstance(name, str) else ""


def _format_row_name(index_name: str, line: int, name: str) -> str:
    """Returns the name of a row in messages: its line and its id."""
    if not line:
        return name
    return f"{index_name} line {line}" + (f" ({name})" if name else "")


def _fingerprint_folder(root: pathlib.Path, name: str) -> str:
    """Returns a string that changes when files in a folder are added or replaced."""
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return ""
    try:
        if path.parts:
            # As ASCII: a name on disk need not be Unicode.
            return f"{name!a} {os.stat(root / path).st_mtime_ns}"
        # The root may hold a working folder, whose writes change the root's own time.
        with os.scandir(root) as entries:
            images = {e.name: e for e in entries if pairs_index.is_image_name(e.name)}
            stats = [(n, images[n].stat(follow_symlinks=False)) for n in sorted(images)]
        return repr([(n, s.st_size, s.st_mtime_ns) for n, s in stats])
    except (OSError, ValueError):
        return ""


READER = base.Reader(locate, compute_signature, open_pairs)
