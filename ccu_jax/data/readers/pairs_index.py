"""Where the rows of a user's own pairs are written down: three ways, one iterator.

`pairs.jsonl`, `pairs.csv`, or neither and folders of pictures named after classes.
What a line says is not looked at here, only whether it is one; see `pairs.py`.
"""

import collections
import csv
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ccu_jax.data.readers import untrusted_files as files
from ccu_jax.data.readers.base import SPLITS, Counts, SkipExample
from ccu_jax.errors import UserError

INDEXES = ("pairs.jsonl", "pairs.csv")
COLUMNS = ("id", "image", "text", "label", "labels", "split", "group")
SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(
    ("val", "valid", "dev"), "validation"
)
SEPARATOR = "|"  # between the labels of a row in a CSV file
_AGAIN = 4  # times that a CSV file may be read over because of broken rows
_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")


class Entry(NamedTuple):
    """A line of an index, or a picture in a folder named after a class."""

    line: int  # from 1; 0 where there is no index
    fields: dict[str, Any]  # COLUMNS and whatever else is there; nothing is checked
    text_file: str | None = None  # path of the file that holds the text


class ClassFolder(NamedTuple):
    """A folder of pictures of one class."""

    path: str  # below the root
    label: str
    split: str | None


def find_root(given: pathlib.Path) -> pathlib.Path:
    """The folder that holds the rows: the given one, or the only fit one in it.

    Raises:
        UserError: there is none, or more than one.
    """
    if index(given):
        return given
    # What is not printable would garble the messages that name the folder.
    below = [given / name for name in _subfolders(given) if name.isprintable()]
    found = [folder for folder in below if index(folder)]
    if len(found) > 1:
        raise UserError(
            f"data.dir: {given} holds {len(found)} folders with an index, "
            f"{found[0].name} and {found[1].name} among them: name one of them"
        )
    if found:
        return found[0]
    for root in (given, *below[: len(below) == 1]):
        if len({folder.label for folder in class_folders(root)}) > 1:
            return root
    raise UserError(
        f"data.dir: {given} holds no {' or '.join(INDEXES)}, and no two folders of "
        'pictures named after classes: write one JSON object a line with "image", '
        '"text" and "label"'
    )


def index(root: pathlib.Path) -> pathlib.Path | None:
    """The index in this folder, if there is one.

    Raises:
        UserError: there are two, or it is a link out of the folder.
    """
    found = [root / name for name in INDEXES if (root / name).is_file()]
    if len(found) > 1:
        raise UserError(
            f"data.dir: {root} holds {' and '.join(INDEXES)}: remove one of them"
        )
    files.reject_external_links(dict.fromkeys(found, root))
    return found[0] if found else None


def entries(root: pathlib.Path, counts: Counts) -> Iterator[Entry | tuple]:
    """Every row of a folder; in place of one that is none, (line, the reason).

    Args:
        root: What `find_root` found.
        counts: Told of what else lies in folders named after classes.
    """
    path = index(root)
    if path is None:
        yield from _pictures(root, counts)
    elif path.suffix == ".csv":
        yield from _csv(path)
    else:
        yield from _jsonl(path)


def picture_folders(root: pathlib.Path) -> set[str]:
    """Paths below `root` of the folders that the rows' pictures lie in; "" is `root`.

    Names that lead out of `root` may be among them.
    """
    path = index(root)
    if path is None:
        return {folder.path for folder in class_folders(root)}
    if path.suffix == ".csv":
        found = (e.fields.get("image") for e in _csv(path) if isinstance(e, Entry))
        return {slashed(name).rpartition("/")[0] for name in found if name}
    # Parsing all of it at every start would take too long.
    pattern, names = re.compile(rb'"image"\s*:\s*"((?:[^"\\]|\\.)*)"'), set()
    for _, line in files.iter_lines(path):
        for name in pattern.findall(line or b""):
            if b"\\" in name:
                try:
                    name = slashed(json.loads(b'"%b"' % name)).encode(errors="replace")
                except ValueError:  # its row is no better
                    continue
            names.add(name.rpartition(b"/")[0])
    return {os.fsdecode(name) for name in names}


def slashed(name: str) -> str:
    """The path of a file with slashes, also if it was written down on Windows."""
    return name.replace("\\", "/")


def class_folders(root: pathlib.Path) -> list[ClassFolder]:
    """The folders of pictures below `root`, in order: CLASS/ or SPLIT/CLASS/."""
    below = _subfolders(root)
    found = []
    for name in below:
        split = SPLIT_NAMES.get(name.casefold())
        if split and not _holds_pictures(root / name):
            found += [
                ClassFolder(f"{name}/{label}", label, split)
                for label in _subfolders(root / name)
                if _holds_pictures(root / name / label)
            ]
    return found or [
        ClassFolder(name, name, None) for name in below if _holds_pictures(root / name)
    ]


def _subfolders(folder: pathlib.Path) -> list[str]:
    """Names in order; links are left out, for they may lead anywhere."""
    with os.scandir(folder) as found:
        return sorted(
            entry.name
            for entry in found
            if entry.is_dir(follow_symlinks=False)
            and not entry.name.startswith(".")
            and entry.name != "__MACOSX"
        )


def _holds_pictures(folder: pathlib.Path) -> bool:
    with os.scandir(folder) as found:
        names = [entry.name for entry in found if is_picture(entry.name)]
    # A run's folder may lie beside the classes, and has a figure in it.
    return bool(names) and not (folder / "events.jsonl").exists()


def is_picture(name: str) -> bool:
    """Whether it is the name of a picture, and no hidden file."""
    return name.casefold().endswith(_SUFFIXES) and not name.startswith(".")


def _pictures(root: pathlib.Path, counts: Counts) -> Iterator[Entry]:
    """The pictures in folders named after classes, with the text beside each."""
    for folder in class_folders(root):
        with os.scandir(root / folder.path) as found:
            kinds = {
                entry.name: entry.is_dir(follow_symlinks=False)
                for entry in found
                if entry.name[:1] != "."
            }
        texts = {name for name in kinds if name.endswith(".txt") and not kinds[name]}
        pictures = sorted(n for n in kinds if is_picture(n) and not kinds[n])
        beside = {name: os.path.splitext(name)[0] + ".txt" for name in pictures}
        for name in pictures:
            text = beside[name] if beside[name] in texts else None
            fields = {
                "image": f"{folder.path}/{name}",
                "label": folder.label,
                "split": folder.split,
            }
            yield Entry(0, fields, text and f"{folder.path}/{text}")
        others = len(kinds) - len(pictures) - len(texts) - sum(kinds.values())
        counts.add("ignored: folder in a class's folder", sum(kinds.values()))
        counts.add("ignored: text without image", len(texts - set(beside.values())))
        counts.add("ignored: file that is neither image nor text", others)


def _jsonl(path: pathlib.Path) -> Iterator[Entry | tuple]:
    for line, raw in files.iter_lines(path):
        try:
            if raw is None:
                raise SkipExample("line too long")
            if not raw.strip():
                continue
            fields = files.parse_json(files.decode_utf8(raw, "line"), "line")
            if not isinstance(fields, dict):
                raise SkipExample("line is no JSON object")
        except SkipExample as reason:
            yield line, reason
        else:
            yield Entry(line, fields)


class _Again:
    """Numbered lines for `csv.reader`; those of a broken row can be read again."""

    def __init__(self, numbered: Iterator[tuple[int, bytes | None]]):
        self._numbered = numbered
        self._back: collections.deque = collections.deque()
        self.taken: list[tuple[int, bytes | None]] = []
        self.size = 0  # of these, in bytes
        self._again = 1 << 23  # bytes that may be read over

    def __iter__(self) -> "_Again":
        return self

    def __next__(self) -> str:
        again = bool(self._back)
        got = self._back.popleft() if again else next(self._numbered)
        size = len(got[1] or b"") + 30  # so that empty lines count, too
        self.taken.append(got)
        self.size += size
        self._again += 0 if again else _AGAIN * size
        if got[1] is None or self.size > files.MAX_LINE_BYTES + 30:
            raise SkipExample("line too long")
        return files.decode_utf8(got[1], "line") + "\n"

    def lost(self) -> list[tuple[int, bytes | None]]:
        """The lines that the broken row costs: the first, the others are put back."""
        self._again -= self.size
        if self._again < 0:  # else every line could cost all lines after it
            return self.taken
        self._back.extendleft(reversed(self.taken[1:]))
        return self.taken[:1]


def _csv(path: pathlib.Path) -> Iterator[Entry | tuple]:
    numbered = files.iter_lines(path)
    names, form = _header(path, numbered)
    lines = _Again(numbered)
    reader = csv.reader(lines, **form)
    while True:
        lines.taken, lines.size = [], 0
        try:
            values = next(reader)
            if not any(value.strip() for value in values):
                continue
            if len(values) != len(names):
                raise SkipExample("other number of fields than the header")
            yield Entry(lines.taken[0][0], _fields(names, values))
        except StopIteration:
            return
        except (csv.Error, SkipExample) as error:
            # A quote that is never closed must cost its own row and no other.
            if len(lines.taken) > 1 or isinstance(error, csv.Error):
                large = len(lines.taken) == 1 and "field limit" in str(error)
                what = "line too long" if large else "line is no valid CSV"
                error = SkipExample(what)
            yield from ((line, error) for line, _ in lines.lost())


def _header(path: pathlib.Path, numbered) -> tuple[list[str], dict[str, Any]]:
    """The columns, and how the file is written."""
    line = next((raw for _, raw in numbered if raw is None or raw.strip()), None)
    try:
        text = files.decode_utf8(line or b"", "line")
    except SkipExample:
        text = ""
    names: list[str] = []
    for delimiter in ",;\t":
        form = {"delimiter": delimiter, "strict": True, "skipinitialspace": True}
        try:
            found = next(csv.reader([text], **form))
        except (csv.Error, StopIteration):
            continue
        found = [name.strip().casefold() for name in found]
        if {"label", "labels"} & set(found) and {"image", "id"} & set(found):
            if twice := [name for name in COLUMNS if found.count(name) > 1]:
                raise UserError(f"{path}: two columns are named {twice[0]!r}")
            return found, form
        names = max(names, found, key=len)
    told = ", ".join(ascii(name[:30]) for name in names[:10]) or "none"
    raise UserError(
        f"{path}: the first line must name the columns, separated by commas, "
        'semicolons or tabs: "image" or "id" (or both), "label" or "labels", and '
        f'"text"; it names {told}'
    )


def _fields(names: list[str], values: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: value.strip() or None for name, value in zip(names, values, strict=True)
    }
    if "labels" in fields and (fields["labels"] or not fields.get("label")):
        fields["labels"] = (fields["labels"] or "").split(SEPARATOR)
    return fields
