"""Pairs of a picture and a text in a folder of the user's own.

The rows are in `pairs.jsonl`, one JSON object a line: `image` (path below the folder,
may be absent or null), `text` (likewise), `label` (a string) or `labels` (a list of
strings), and optionally `id`, `group` (rows to be forgotten together) and `split`.
Or they are in `pairs.csv` with these columns, "|" between the labels of a row. Or there
is no index and the pictures lie in folders named after classes, `cats/1.jpg` or
`train/cats/1.jpg`, the text of a picture, if it has one, in `1.txt` beside it.

Without a folder the pairs are the clip art that travels with the package, or one of two
worked examples on generated data.
"""

import hashlib
import os
import pathlib

from ccu_jax.config.schema import Data
from ccu_jax.data.clipart import CLIPART
from ccu_jax.data.pairs_row import Row, checked
from ccu_jax.data.readers import pairs_index
from ccu_jax.data.readers.base import (
    MARKER,
    SPLITS,
    Counts,
    Example,
    Location,
    Reader,
    SkipExample,
    Source,
    Unpack,
    digest,
)
from ccu_jax.data.readers.pairs_index import Entry
from ccu_jax.data.readers.untrusted_files import Folder, clean_text
from ccu_jax.errors import UserError

EXAMPLES = ("medical", "satellite")  # keys of samples.editions.WRITERS
MOST_CLASSES = 10_000


def locate(config: Data, workdir: pathlib.Path) -> Location:
    """Returns the user's folder, the clip art, or a sample edition below `workdir`."""
    if config.dir is not None:
        given = pathlib.Path(config.dir).expanduser()
        if not given.is_dir():
            raise UserError(f"data.dir: there is no folder {given}")
        root = pairs_index.find_root(given)
        return Location(root, "sample" if (root / MARKER).is_file() else "own")
    if config.sample == "clipart":
        return Location(CLIPART, "clipart")
    if config.sample not in EXAMPLES:
        raise UserError(
            f"data.sample: {config.sample!r} is none of clipart, {', '.join(EXAMPLES)}"
        )
    return Location(workdir / "sample" / config.sample, "sample")


def signature(config: Data, place: Location) -> str:
    """Hash of the index and, for a user's folder, when its picture folders changed."""
    path, marks = pairs_index.index(place.root), list[str]()
    if path:
        with path.open("rb") as file:
            marks.append(hashlib.file_digest(file, "blake2b").hexdigest())
    if place.edition == "clipart":
        return digest(*marks)
    if config.dir is None:
        return digest(*marks, (place.root / MARKER).read_bytes())
    # Only folders that pictures lie in: a workdir may be below the root, too.
    for name in sorted(pairs_index.picture_folders(place.root)):
        marks.append(_mark(place.root, name))
    return digest(*marks)


def open_pairs(config: Data, place: Location, counts: Counts, unpack: Unpack) -> Source:
    """Reads the index; pictures are read one at a time by `Source.read`.

    Raises:
        UserError: no index that can be read; a row that must be skipped when
            `config.strict`.
    """
    del unpack  # the folder itself may come as an archive, but has none in it
    path = pairs_index.index(place.root)
    rows, multi_label = _usable(place.root, path.name if path else "", counts)
    classes = tuple(sorted({label for row in rows for label in row.labels}))
    if len(classes) > MOST_CLASSES:
        raise UserError(
            f"{path or place.root}: {len(classes):,} different labels in {len(rows):,} "
            "rows; a label is one of few classes, and what describes a row is its text"
        )
    rows = _with_all_splits(rows, config, counts)
    if shared := _groups_in_two_splits(rows):
        if counts.strict:
            raise UserError(f"{path}: {shared} groups have rows in two splits")
        counts.add("noted: group with rows in two splits", shared)
    folder = Folder(place.root)

    def read(row: Row) -> Example:
        image = folder.read(row.image, "image") if row.image else None
        text, notes = row.text, row.notes
        if row.text_file:
            text, notes = clean_text(folder.text(row.text_file, "text"))
        return Example(row.id, row.group, image, text, row.labels, row.split, notes)

    return Source(
        classes,
        multi_label,
        "micro_f1" if multi_label else "accuracy",
        [row for split in SPLITS for row in rows if row.split == split],
        read,
        lambda row: _where(path.name if path else "", row.line, row.id),
    )


def split_rows(rows: list[Row], *, test: float, validation: float) -> list[Row]:
    """Gives a split to each row without one: the same for all rows of a group.

    In every stratum (groups with equal labels) the groups stand in the order of their
    hash; the first ones go to test, the next to validation, the rest to train. What
    rounding leaves over is carried to the next stratum, so the shares hold overall.

    Args:
        rows: Rows with unique ids.
        test: Share of the rows for test, in [0, 1).
        validation: Likewise.
    """
    named = {row.group: row.split for row in reversed(rows) if row.split}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.group not in named:
            groups.setdefault(row.group, []).append(row)
    strata: dict[tuple[str, ...], list[str]] = {}
    for group, members in groups.items():
        labels = tuple(sorted({label for row in members for label in row.labels}))
        strata.setdefault(labels, []).append(group)
    owed = {"test": 0.0, "validation": 0.0}
    for labels in sorted(strata):
        ordered = sorted(strata[labels], key=lambda group: digest("split", group))
        total = sum(len(groups[group]) for group in ordered)
        owed["test"] += test * total
        owed["validation"] += validation * total
        for group in ordered:
            size = len(groups[group])
            named[group] = "train"
            for name, rest in owed.items():
                if rest >= size / 2 and rest > 0:
                    named[group] = name
                    owed[name] -= size
                    break
    return [row._replace(split=row.split or named[row.group]) for row in rows]


def _with_all_splits(rows: list[Row], config: Data, counts: Counts) -> list[Row]:
    """Gives every row a split; one that the index leaves out is cut from train."""
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    if not all(row.split for row in rows):
        return split_rows(rows, **shares)
    there = {row.split for row in rows}
    shares = {name: 0.0 if name in there else share for name, share in shares.items()}
    elsewhere = {row.group for row in rows if row.split != "train"}
    free = [row._replace(split="") for row in rows if row.group not in elsewhere]
    taken = {row.id: row.split for row in split_rows(free, **shares)}
    for name in shares:
        moved = sum(split == name for split in taken.values())
        counts.add(f"noted: train row taken for {name}", moved)
    return [row._replace(split=taken.get(row.id, row.split)) for row in rows]


def _groups_in_two_splits(rows: list[Row]) -> int:
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.group, set()).add(row.split)
    return sum(len(found) > 1 for found in splits.values())


def _usable(root: pathlib.Path, index: str, counts: Counts) -> tuple[list[Row], bool]:
    """The rows that are fit, and whether one of them has `labels`."""
    rows: list[Row] = []
    multi_label, seen, same = False, set(), {}
    for entry in pairs_index.entries(root, counts):
        counts.add("read")
        try:
            if not isinstance(entry, Entry):
                raise entry[1]
            row = checked(entry)
            if row.id in seen:
                raise SkipExample("id already used")
        except SkipExample as reason:
            counts.skip(str(reason), _where(index, entry[0], _called(entry)))
            continue
        seen.add(row.id)
        multi_label |= entry.fields.get("labels") is not None
        # One object for all rows of a class: there may be a million.
        rows.append(row._replace(labels=same.setdefault(row.labels, row.labels)))
    return rows, multi_label


def _called(entry: Entry | tuple) -> str:
    """What a row that is not fit says of its own name."""
    fields = entry.fields if isinstance(entry, Entry) else {}
    name = fields.get("id") or fields.get("image")
    return ascii(name)[1:-1][:80] if isinstance(name, str) else ""


def _where(index: str, line: int, name: str) -> str:
    if not line:
        return name
    return f"{index} line {line} ({name})" if name else f"{index} line {line}"


def _mark(root: pathlib.Path, name: str) -> str:
    """When something in this folder was added, removed or renamed."""
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return ""
    try:
        if path.parts:
            # As ASCII: a name on a disk need not be Unicode.
            return f"{name!a} {os.stat(root / path).st_mtime_ns}"
        # The root itself may hold a workdir, and changes with it.
        with os.scandir(root) as found:
            files = {e.name: e for e in found if pairs_index.is_picture(e.name)}
            stats = [(n, files[n].stat(follow_symlinks=False)) for n in sorted(files)]
        return repr([(n, s.st_size, s.st_mtime_ns) for n, s in stats])
    except (OSError, ValueError):
        return ""


READER = Reader(locate, signature, open_pairs)
