"""Reads the unvalidated rows of a user's own pairs.

The rows are in `pairs.jsonl`, `pairs.csv` or, without an index, in folders of images
named after classes. `pairs.py` validates the fields.
"""

import collections
import csv
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ccu_jax.data.readers import untrusted_files
from ccu_jax.data.readers.base import SPLITS, Counts, SkipExample
from ccu_jax.data.readers.untrusted_files import NumberedLines
from ccu_jax.errors import UserError

INDEXES = ("pairs.jsonl", "pairs.csv")
_COLUMNS = ("id", "image", "text", "label", "labels", "split", "group")
SPLIT_NAMES = dict(zip(SPLITS, SPLITS, strict=True)) | dict.fromkeys(
    ("val", "valid", "dev"), "validation"
)
_SEPARATOR = "|"  # between the labels of a row in a CSV file
_MAX_REREAD_RATIO = 4  # of the bytes that are read again to those of the CSV file
_MIN_REREAD_BYTES = 1 << 23  # that may be read again in any CSV file
_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


class Entry(NamedTuple):
    """A line of an index, or an image in a folder named after a class."""

    line: int  # from 1; 0 if there is no index
    fields: dict[str, Any] | SkipExample  # by column, or why they cannot be read
    text_file: str | None = None  # path of the file with the text


def find_root(user_folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder with the rows: the user's, or its only suitable subfolder."""
    if find_index(user_folder):
        return user_folder
    # A name that is not printable would garble messages.
    names = filter(str.isprintable, _list_subfolders(user_folder))
    below = [user_folder / name for name in names]
    indexed = [folder for folder in below if find_index(folder)]
    if len(indexed) > 1:
        raise UserError(
            f"data.dir: {user_folder} has {len(indexed)} subfolders with an index, "
            f"such as {indexed[0].name} and {indexed[1].name}; set data.dir to one of "
            "the subfolders"
        )
    if indexed:
        return indexed[0]
    for root in (user_folder, *below[: len(below) == 1]):
        if len({label for _, label, _ in _find_class_folders(root)}) > 1:
            return root
    raise UserError(
        f"data.dir: {user_folder} contains no {' or '.join(INDEXES)}, and no two "
        f"folders of images named after classes: write {INDEXES[0]} with one JSON "
        'object per line, with "image", "text" and "label"'
    )


def find_index(root: pathlib.Path) -> pathlib.Path | None:
    """Returns the index of a folder, or None; raises UserError if there are two."""
    indexes = [root / name for name in INDEXES if (root / name).is_file()]
    if len(indexes) > 1:
        raise UserError(
            f"data.dir: {root} contains {' and '.join(INDEXES)}: remove one of them"
        )
    untrusted_files.reject_external_links(dict.fromkeys(indexes, root))
    return indexes[0] if indexes else None


def iter_entries(root: pathlib.Path, counts: Counts) -> Iterator[Entry]:
    """Yields the rows below a root that `find_root` returned.

    Unused files in folders named after classes are added to `counts`.
    """
    path = find_index(root)
    if path is None:
        yield from _iter_folder_entries(root, counts)
    elif path.suffix == ".csv":
        yield from _iter_csv_entries(path)
    else:
        for number, line in untrusted_files.iter_lines(path):
            try:
                yield Entry(number, untrusted_files.parse_json_line(line))
            except SkipExample as reason:
                yield Entry(number, reason)


def find_image_folders(root: pathlib.Path) -> set[str]:
    """Returns the folders with images, as paths below `root`; "" is `root` itself.

    The paths are not validated and may lead out of `root`.
    """
    folders = set()
    for entry in iter_entries(root, Counts(str(root), strict=False)):
        image = isinstance(entry.fields, dict) and entry.fields.get("image")
        if isinstance(image, str):
            folders.add(to_posix(image).rpartition("/")[0])
    return folders


def to_posix(path: str) -> str:
    """Replaces the backslashes in a Windows path with slashes."""
    return path.replace("\\", "/")


def _find_class_folders(root: pathlib.Path) -> list[tuple[str, str, str | None]]:
    """Returns (path, label, split) of each folder CLASS/ or SPLIT/CLASS/, sorted."""
    below = _list_subfolders(root)
    in_splits = []
    for name in below:
        split = SPLIT_NAMES.get(name.casefold())
        if split and not _has_images(root / name):
            in_splits += [
                (f"{name}/{label}", label, split)
                for label in _list_subfolders(root / name)
                if _has_images(root / name / label)
            ]
    return in_splits or [
        (name, name, None) for name in below if _has_images(root / name)
    ]


def _list_subfolders(folder: pathlib.Path) -> list[str]:
    """Returns the sorted names of the subfolders, except hidden ones and links."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir(follow_symlinks=False)
            and not entry.name.startswith(".")
            and entry.name != "__MACOSX"
        )


def _has_images(folder: pathlib.Path) -> bool:
    with os.scandir(folder) as entries:
        has_images = any(is_image_name(entry.name) for entry in entries)
    # A run's working folder may lie beside the class folders, and contains a figure.
    return has_images and not (folder / "events.jsonl").exists()


def is_image_name(name: str) -> bool:
    """Returns whether a file name has an image suffix and is not hidden."""
    return name.casefold().endswith(_SUFFIXES) and not name.startswith(".")


def _iter_folder_entries(root: pathlib.Path, counts: Counts) -> Iterator[Entry]:
    """Yields the images in folders named after classes, with their text files."""
    for path, label, split in _find_class_folders(root):
        with os.scandir(root / path) as entries:
            is_folder = {
                entry.name: entry.is_dir(follow_symlinks=False)
                for entry in entries
                if not entry.name.startswith(".")
            }
        files = {name for name in is_folder if not is_folder[name]}
        images = sorted(name for name in files if is_image_name(name))
        texts = {name for name in files if name.endswith(".txt")}
        unused_texts = set(texts)
        for name in images:
            text = os.path.splitext(name)[0] + ".txt"
            unused_texts.discard(text)
            fields = {"image": f"{path}/{name}", "label": label, "split": split}
            yield Entry(0, fields, f"{path}/{text}" if text in texts else None)
        num_others = len(files) - len(images) - len(texts)
        counts.add("ignored: folder in a class's folder", sum(is_folder.values()))
        counts.add("ignored: text without image", len(unused_texts))
        counts.add("ignored: file that is neither image nor text", num_others)


def _iter_csv_entries(path: pathlib.Path) -> Iterator[Entry]:
    """Yields the rows of a CSV file.

    An unclosed quote merges many lines into one broken row. Only the first of these
    lines is skipped; the others are read again. Once too many bytes were read again,
    all lines of a broken row are skipped: otherwise the time could grow with the square
    of the file size.
    """
    lines = untrusted_files.iter_lines(path, with_blank=True)
    names, dialect = _read_header(path, lines)
    returned: collections.deque[_Line] = collections.deque()
    last_line, reread_budget = 0, _MIN_REREAD_BYTES
    while True:
        row: list[_Line] = []
        texts = _iter_csv_texts(itertools.chain(_pop_all(returned), lines), row)
        reason = None
        try:
            values = next(csv.reader(texts, **dialect))
            if any(value.strip() for value in values):
                if len(values) != len(names):
                    raise SkipExample("other number of fields than the header")
                yield Entry(row[0].number, _build_fields(names, values))
        except StopIteration:
            return
        except (csv.Error, SkipExample) as error:
            reason = SkipExample("line is no valid CSV")
            if len(row) == 1 and isinstance(error, SkipExample):
                reason = error
            elif len(row) == 1 and "field limit" in str(error):
                reason = SkipExample("line too long")
        reread_budget += _MAX_REREAD_RATIO * sum(
            line.size for line in row if line.number > last_line
        )
        last_line = max(last_line, row[-1].number)
        if reason:
            reread_budget -= sum(line.size for line in row)
            num_skipped = 1 if reread_budget >= 0 else len(row)
            returned.extendleft(reversed(row[num_skipped:]))
            yield from (Entry(line.number, reason) for line in row[:num_skipped])


class _Line(NamedTuple):
    """A numbered line; `content` is None if it was too long."""

    number: int
    content: bytes | None

    @property
    def size(self) -> int:
        return len(self.content or b"") + 30  # empty lines count as well


def _pop_all(items: collections.deque) -> Iterator:
    while items:
        yield items.popleft()


def _iter_csv_texts(lines: NumberedLines, row: list[_Line]) -> Iterator[str]:
    """Yields decoded lines for `csv.reader`, and appends each line to `row`."""
    size = 0
    for line in itertools.starmap(_Line, lines):
        row.append(line)
        size += line.size
        if size > untrusted_files.MAX_LINE_BYTES + 30:
            raise SkipExample("line too long")
        yield untrusted_files.decode_line(line.content) + "\n"


def _read_header(
    path: pathlib.Path, numbered: NumberedLines
) -> tuple[list[str], dict[str, Any]]:
    """Returns the column names, and the `csv.reader` arguments that fit the file."""
    line = next((raw for _, raw in numbered if raw is None or raw.strip()), None)
    try:
        text = untrusted_files.decode_line(line)
    except SkipExample:
        text = ""
    longest: list[str] = []
    for delimiter in ",;\t":
        dialect = {"delimiter": delimiter, "strict": True, "skipinitialspace": True}
        try:
            names = next(csv.reader([text], **dialect))
        except (csv.Error, StopIteration):
            continue
        names = [name.strip().casefold() for name in names]
        if {"label", "labels"} & set(names) and {"image", "id"} & set(names):
            for name in _COLUMNS:
                if names.count(name) > 1:
                    raise UserError(f"{path}: two columns named {name!r}; rename one")
            return names, dialect
        longest = max(longest, names, key=len)
    columns = ", ".join(ascii(name[:30]) for name in longest[:10]) or "none"
    raise UserError(
        f"{path}: the first line must name the columns, separated by commas, "
        'semicolons or tabs: "image" or "id" (or both), "label" or "labels", and '
        f'"text"; it names {columns}'
    )


def _build_fields(names: list[str], values: list[str]) -> dict[str, Any]:
    """Returns the values of a CSV row by column, with its labels as a list."""
    fields: dict[str, Any] = {
        name: value.strip() or None for name, value in zip(names, values, strict=True)
    }
    if "labels" in fields and (fields["labels"] or not fields.get("label")):
        fields["labels"] = (fields["labels"] or "").split(_SEPARATOR)
    return fields
