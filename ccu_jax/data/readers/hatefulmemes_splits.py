"""The lists of Hateful Memes: which rows can be used, and for what.

{"id":1235,"img":"img\\/01235.png","label":0,"text":"..."}            first phase
{"id": "01235", "img": "img/01235.png", "label": 0, "text": "..."}    second phase
"""

import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ccu_jax.data.readers.base import Counts, SkipExample, hash_fraction
from ccu_jax.data.readers.untrusted_files import (
    clean_text,
    decode_utf8,
    iter_lines,
    parse_json,
)
from ccu_jax.errors import UserError

TRAIN = "train.jsonl"
# The second phase comes first: it mended labels.
_DEV = ("dev_seen.jsonl", "dev_unseen.jsonl", "dev.jsonl")
_TEST = ("test_seen.jsonl", "test_unseen.jsonl", "test.jsonl")
FILES = (TRAIN, *_DEV, *_TEST)
# Of what else could be in a path, some leads elsewhere and some breaks lists of ids.
_IMAGE = re.compile(r"img/([^/\\]+)")


class Row(NamedTuple):
    """A meme that can be used if its picture can."""

    id: str  # the stem of the picture's name; the field "id" may have lost its zeros
    image: str  # name of the file in img/
    text: str | None
    label: int
    split: str  # of SPLITS
    notes: tuple[str, ...]


def rows(root: pathlib.Path, validation: float, counts: Counts) -> list[Row]:
    """The usable rows of all lists in a folder, each id once.

    Args:
        root: The folder with `train.jsonl`.
        validation: Share of the training rows that become the validation split where
            the dev files cannot.
        counts: Told of everything that is left out, or worth a note.

    Raises:
        UserError: no row to train on, or none to test; a list that cannot be read.
    """
    seen: dict[str, tuple[str, str, int]] = {}
    try:
        train = _collect(root, "train", (TRAIN,), counts, seen)
        dev = _collect(root, "dev", _DEV, counts, seen)
        test = _collect(root, "test", _TEST, counts, seen)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror}") from None
    counts.add("noted: text with both labels", _texts_with_both_labels(train))
    if not train:
        raise counts.no_rows_error()
    if not test:
        if not dev:
            raise UserError(
                f"{root}: no row with a label in any of {', '.join(_DEV + _TEST)}: "
                "without them there is nothing to test with"
            )
        counts.add("noted: no labelled test file: the dev files are the test set")
        dev, test = [], dev
    elif not dev:
        counts.add("noted: no labelled dev file: validation is a part of train")
    kept = (
        set()
        if dev
        else {
            row.id for row in train if hash_fraction("validation", row.id) < validation
        }
    )
    return [
        *(row for row in train if row.id not in kept),
        *(row._replace(split="validation") for row in train if row.id in kept),
        *(row._replace(split="validation") for row in dev),
        *(row._replace(split="test") for row in test),
    ]


def _texts_with_both_labels(found: list[Row]) -> int:
    labels: dict[str, set[int]] = {}
    for row in found:
        if row.text is not None:
            labels.setdefault(row.text, set()).add(row.label)
    return sum(len(of_text) == 2 for of_text in labels.values())


def _collect(
    root: pathlib.Path,
    kind: str,
    names: tuple[str, ...],
    counts: Counts,
    seen: dict[str, tuple[str, str, int]],
) -> list[Row]:
    """The usable rows of the train, dev or test files.

    `seen` has of each id so far the kind and name of its file, and its label.
    """
    found = []
    for name in names:
        path = root / name
        if not path.is_file():
            continue
        counts.add("noted: file without final newline", int(_ends_open(path)))
        for number, got in _rows(path):
            where = f"{name} line {number}"
            if isinstance(got, SkipExample):
                counts.add("read")
                counts.skip(str(got), where)
                continue
            of, file, label = seen.get(got.id, (kind, "", 0))
            if of == kind and file not in ("", name):
                # dev_seen and dev_unseen have 400 memes in common: no second row.
                counts.add(f"noted: id in two {kind} files")
                if label != got.label:
                    counts.add(f"noted: label differs in two {kind} files")
                continue
            counts.add("read")
            if of != kind:
                counts.skip(f"id is in the {of} split too", f"{where} ({got.id})")
            elif file:
                counts.skip("id listed twice", f"{where} ({got.id})")
            else:
                seen[got.id] = kind, name, got.label
                found.append(got)
    return found


def _rows(path: pathlib.Path) -> Iterator[tuple[int, Row | SkipExample]]:
    """The rows of a list with their lines' numbers; blank lines are none."""
    for number, line in iter_lines(path):
        try:
            if line is None:
                raise SkipExample("line too long")
            if line.strip():
                yield number, _row(parse_json(decode_utf8(line, "line"), "line"))
        except SkipExample as reason:
            yield number, reason


def _ends_open(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _row(entry: Any) -> Row:
    """A row of a list; its split is that of train until it is told otherwise.

    Raises:
        SkipExample: why it cannot be used.
    """
    if not isinstance(entry, dict):
        raise SkipExample("line is no JSON object")
    image = entry.get("img")
    match = _IMAGE.fullmatch(image) if isinstance(image, str) else None
    if not match or not image.isprintable() or match[1] in (".", ".."):
        raise SkipExample("img is no path below img/")
    id_ = pathlib.PurePosixPath(match[1]).stem
    if id_ != id_.strip() or f"{id_} ".startswith("# "):  # lost in a list of ids
        raise SkipExample("img is no path below img/")
    label = _label(entry)
    text, notes = _text(entry.get("text"))
    return Row(id_, match[1], text, label, "train", (*_id_notes(entry, id_), *notes))


def _label(entry: dict[str, Any]) -> int:
    """0 or 1; -1 and null stand for no label, which is not 0."""
    label = entry.get("label")
    if isinstance(label, str):
        label = {"0": 0, "1": 1, "-1": -1}.get(label, label)
    if label is None or label == -1:
        raise SkipExample("no label")
    if label not in (0, 1):
        raise SkipExample("label is neither 0 nor 1")
    return int(label)


def _id_notes(entry: dict[str, Any], id_: str) -> Iterator[str]:
    """What to tell of a field "id" that is not the picture's name."""
    given = entry.get("id")
    if isinstance(given, bool) or not isinstance(given, int | str):
        yield "noted: id is not the image's"
    elif str(given) != id_:
        if str(given).lstrip("0") == id_.lstrip("0"):
            yield "noted: id without its leading zeros"
        else:
            yield "noted: id is not the image's"


def _text(value: Any) -> tuple[str | None, tuple[str, ...]]:
    """The text as it can be stored and shown, and what had to be done for that."""
    text, notes = clean_text(value if isinstance(value, str) else None)
    if text is None:
        notes += ("noted: row without text",)
    elif not text.isascii():
        notes += ("noted: non-ASCII text",)
    return text, notes
