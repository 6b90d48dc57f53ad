r"""The lists of Hateful Memes: which rows can be used, and the split of each.

{"id":1235,"img":"img\/01235.png","label":0,"text":"..."}            first phase
{"id": "01235", "img": "img/01235.png", "label": 0, "text": "..."}    second phase
"""

import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ccu_jax.data.readers.base import Counts, SkipExample, hash_fraction
from ccu_jax.data.readers.untrusted_files import clean_text, iter_json_lines
from ccu_jax.errors import UserError

TRAIN = "train.jsonl"
# The second phase comes first: it corrected labels.
_DEV = ("dev_seen.jsonl", "dev_unseen.jsonl", "dev.jsonl")
_TEST = ("test_seen.jsonl", "test_unseen.jsonl", "test.jsonl")
FILES = (TRAIN, *_DEV, *_TEST)
# Other paths may lead out of the folder, or break lists of ids.
_IMAGE = re.compile(r"img/([^/\\]+)")


class Row(NamedTuple):
    """A meme that can be used if its image can."""

    id: str  # stem of the image's name; the field "id" may have lost leading zeros
    image: str  # name of the file in img/
    text: str | None
    label: int
    split: str  # one of SPLITS
    notes: tuple[str, ...]


def read_rows(
    root: pathlib.Path, validation_fraction: float, counts: Counts
) -> list[Row]:
    """Reads all lists in a folder and returns the usable rows, each id once.

    `validation_fraction` of the training rows become the validation split if the dev
    files cannot.

    Raises:
        UserError: no row to train on, or none to test on; a list cannot be read.
    """
    seen: dict[str, _Seen] = {}
    try:
        train = _read_kind(root, "train", (TRAIN,), counts, seen)
        dev = _read_kind(root, "dev", _DEV, counts, seen)
        test = _read_kind(root, "test", _TEST, counts, seen)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror}") from None
    counts.add("noted: text with both labels", _count_ambiguous_texts(train))
    if not train:
        raise counts.no_rows_error()
    if not test and not dev:
        raise UserError(
            f"{root}: no row to test on: none with a label in any of "
            f"{', '.join(_DEV + _TEST)}"
        )
    validation_ids = set()
    if not test:
        counts.add("noted: no labelled test file: the dev files are the test set")
        dev, test = [], dev
    elif not dev:
        counts.add("noted: no labelled dev file: validation is a part of train")
    if not dev:
        validation_ids = {
            row.id
            for row in train
            if hash_fraction("validation", row.id) < validation_fraction
        }
    return [
        *(row for row in train if row.id not in validation_ids),
        *(r._replace(split="validation") for r in train if r.id in validation_ids),
        *(row._replace(split="validation") for row in dev),
        *(row._replace(split="test") for row in test),
    ]


def _count_ambiguous_texts(rows: list[Row]) -> int:
    labels: dict[str, set[int]] = {}
    for row in rows:
        if row.text is not None:
            labels.setdefault(row.text, set()).add(row.label)
    return sum(len(labels_of_text) == 2 for labels_of_text in labels.values())


class _Seen(NamedTuple):
    """The first row of an id."""

    kind: str  # "train", "dev" or "test"
    where: str  # file and line
    file: str
    label: int


def _read_kind(
    root: pathlib.Path,
    kind: str,
    names: tuple[str, ...],
    counts: Counts,
    seen: dict[str, _Seen],
) -> list[Row]:
    """Returns the usable rows of the train, dev or test files; adds them to `seen`."""
    rows = []
    for name in names:
        path = root / name
        if not path.is_file():
            continue
        counts.add("noted: file without final newline", int(_lacks_final_newline(path)))
        for line, fields in iter_json_lines(path):
            where = f"{name} line {line}"
            try:
                row = _parse_row(fields)
            except SkipExample as reason:
                counts.add("read")
                counts.skip(str(reason), where)
                continue
            first = seen.setdefault(row.id, _Seen(kind, where, name, row.label))
            if first.kind == kind and first.file != name:
                # dev_seen and dev_unseen have 400 memes in common: not a second row.
                counts.add(f"noted: id in two {kind} files")
                if first.label != row.label:
                    counts.add(f"noted: label differs in two {kind} files")
                continue
            counts.add("read")
            if first.where == where:
                rows.append(row)
            elif first.kind == kind:
                counts.skip("id listed twice", f"{where} ({row.id})")
            else:
                reason = f"id is in the {first.kind} split too"
                counts.skip(reason, f"{where} ({row.id})")
    return rows


def _lacks_final_newline(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _parse_row(fields: dict[str, Any] | SkipExample) -> Row:
    """Returns a row of a list, with split "train"; raises SkipExample."""
    if isinstance(fields, SkipExample):
        raise fields
    image, text = fields.get("img"), fields.get("text")
    match = _IMAGE.fullmatch(image) if isinstance(image, str) else None
    name = match[1] if match else ""
    id_ = pathlib.PurePosixPath(name).stem
    if not name or not name.isprintable() or name in (".", ".."):
        raise SkipExample("img is no path below img/")
    if id_ != id_.strip() or f"{id_} ".startswith("# "):  # lost in a list of ids
        raise SkipExample("img is no path below img/")
    label = _parse_label(fields.get("label"))
    text, notes = clean_text(text if isinstance(text, str) else None)
    if text is None:
        notes += ("noted: row without text",)
    elif not text.isascii():
        notes += ("noted: non-ASCII text",)
    return Row(id_, name, text, label, "train", (*_id_notes(fields, id_), *notes))


def _parse_label(label: Any) -> int:
    """Returns 0 or 1; raises SkipExample for -1 and null, which stand for no label."""
    if isinstance(label, str):
        label = {"0": 0, "1": 1, "-1": -1}.get(label, label)
    if label is None or label == -1:
        raise SkipExample("no label")
    if label not in (0, 1):
        raise SkipExample("label is neither 0 nor 1")
    return int(label)


def _id_notes(fields: dict[str, Any], id_: str) -> Iterator[str]:
    """Yields the note for a field "id" that is not the stem of the image's name."""
    field = fields.get("id")
    if isinstance(field, bool) or not isinstance(field, int | str):
        yield "noted: id is not the image's"
    elif str(field) != id_:
        if str(field).lstrip("0") == id_.lstrip("0"):
            yield "noted: id without its leading zeros"
        else:
            yield "noted: id is not the image's"
