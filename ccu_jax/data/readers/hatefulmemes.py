r"""Hateful Memes (Kiela et al., 2020) in its official layouts: memes, hateful or not.

    data/img/<5 digits>.png        the images, or img.tar.gz (img.zip) of them
    data/train.jsonl               a JSON object per row
    data/dev.jsonl  test.jsonl     first phase of the contest:
        {"id":1235,"img":"img\/01235.png","label":0,"text":"..."}
    data/dev_seen.jsonl  dev_unseen.jsonl  test_seen.jsonl  test_unseen.jsonl   second:
        {"id": "01235", "img": "img/01235.png", "label": 0, "text": "..."}

Get it from https://hatefulmemeschallenge.com/ , where its license is accepted; this
module downloads nothing. The official files are offensive: no row of them belongs in
messages, documents or tests.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ccu_jax.config.schema import Data
from ccu_jax.data.readers import base
from ccu_jax.data.readers.base import Counts, Example, SkipExample
from ccu_jax.data.readers.releases import Release
from ccu_jax.data.readers.untrusted_files import (
    Folder,
    clean_text,
    iter_lines,
    parse_json_line,
)
from ccu_jax.errors import UserError

CLASSES = ("not-hateful", "hateful")
TRAIN = "train.jsonl"
# The second phase comes first: it corrected labels.
_DEV = ("dev_seen.jsonl", "dev_unseen.jsonl", "dev.jsonl")
_TEST = ("test_seen.jsonl", "test_unseen.jsonl", "test.jsonl")
FILES = (TRAIN, *_DEV, *_TEST)
# Other paths may lead out of the folder, or break lists of ids.
_IMAGE = re.compile(r"img/([^/\\]+)")


class Row(NamedTuple):
    """A validated line of an annotation file."""

    id: str  # stem of the image's name; the field "id" may have lost leading zeros
    image: str  # name of the file in img/
    text: str | None
    label: int
    split: str  # one of SPLITS
    notes: tuple[str, ...]


def open_hatefulmemes(
    config: Data, location: base.Location, counts: Counts, unpack: base.Unpack
) -> base.Source:
    """Opens Hateful Memes: reads the annotation files and assigns splits.

    The dev files are the validation split, and the test files with labels the test
    split. Without labeled test files, as during the contest, the dev files are the
    test split, and a fraction of the training rows becomes the validation split.

    Raises:
        UserError: no training rows, no test rows, or a file cannot be read.
    """
    rows = _read_rows(location.root, config.validation_fraction, counts)
    folder = Folder(RELEASE.unpack_images(location.root, counts, unpack))

    def read(row: Row) -> Example:
        image = folder.read(row.image, "image")
        labels = (CLASSES[row.label],)
        return Example(row.id, row.id, image, row.text, labels, row.split, row.notes)

    return base.Source(CLASSES, False, "auroc", rows, read, lambda row: row.id)


def _read_rows(
    root: pathlib.Path, validation_fraction: float, counts: Counts
) -> list[Row]:
    """Reads all annotation files and returns the usable rows, deduplicated by id."""
    seen: dict[str, _FirstRow] = {}
    try:
        train = _read_lists(root, "train", (TRAIN,), counts, seen)
        dev = _read_lists(root, "dev", _DEV, counts, seen)
        test = _read_lists(root, "test", _TEST, counts, seen)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror}") from None
    texts = ((row.text, row.label) for row in train if row.text is not None)
    counts.add("noted: text with both labels", base.count_ambiguous(texts))
    if not train:
        raise counts.no_rows_error()
    if not test and not dev:
        raise UserError(
            f"{root}: no test rows; add one of these files, with labels: "
            f"{', '.join(_DEV + _TEST)}"
        )
    if not test:
        counts.add("noted: no labelled test file: the dev files are the test set")
        dev, test = [], dev
    elif not dev:
        counts.add("noted: no labelled dev file: validation is a part of train")
    if not dev:
        fractions = {row.id: base.hash_fraction("validation", row.id) for row in train}
        dev = [row for row in train if fractions[row.id] < validation_fraction]
        train = [row for row in train if fractions[row.id] >= validation_fraction]
    splits = {"train": train, "validation": dev, "test": test}
    return [row._replace(split=name) for name, rows in splits.items() for row in rows]


class _FirstRow(NamedTuple):
    """The first occurrence of an id: its file, line and label."""

    kind: str  # "train", "dev" or "test"
    where: str  # file and line
    file: str
    label: int


def _read_lists(
    root: pathlib.Path,
    kind: str,
    names: tuple[str, ...],
    counts: Counts,
    seen: dict[str, _FirstRow],
) -> list[Row]:
    """Reads the usable rows of one kind of file, and registers their ids in `seen`."""
    rows = []
    for name in names:
        path = root / name
        if not path.is_file():
            continue
        counts.add("noted: file without final newline", int(_lacks_final_newline(path)))
        for line, raw in iter_lines(path):
            where = f"{name} line {line}"
            try:
                row = _parse_row(parse_json_line(raw))
            except SkipExample as reason:
                counts.add("read")
                counts.skip(str(reason), where)
                continue
            first = seen.setdefault(row.id, _FirstRow(kind, where, name, row.label))
            if first.kind == kind and first.file != name:
                # dev_seen and dev_unseen share 400 memes, which are read once.
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


def _parse_row(fields: dict[str, Any]) -> Row:
    """Builds a row, with split "train", from a JSON object; raises SkipExample."""
    image, text = fields.get("img"), fields.get("text")
    match = _IMAGE.fullmatch(image) if isinstance(image, str) else None
    name = match[1] if match else ""
    id_ = pathlib.PurePosixPath(name).stem
    is_unlistable = id_ != id_.strip() or f"{id_} ".startswith("# ")
    if not name or not name.isprintable() or name in (".", "..") or is_unlistable:
        raise SkipExample("img is no path below img/")
    label = _parse_label(fields.get("label"))
    text, notes = clean_text(text if isinstance(text, str) else None)
    if text is None:
        notes += ("noted: row without text",)
    elif not text.isascii():
        notes += ("noted: non-ASCII text",)
    return Row(id_, name, text, label, "train", (*_iter_id_notes(fields, id_), *notes))


def _parse_label(label: Any) -> int:
    """Returns 0 or 1; raises SkipExample for -1 and null, which mean unlabeled."""
    if isinstance(label, str):
        label = {"0": 0, "1": 1, "-1": -1}.get(label, label)
    if label is None or label == -1:
        raise SkipExample("no label")
    if label not in (0, 1):
        raise SkipExample("label is neither 0 nor 1")
    return int(label)


def _iter_id_notes(fields: dict[str, Any], id_: str) -> Iterator[str]:
    """Yields a note if the field "id" differs from the stem of the image's name."""
    field = fields.get("id")
    is_id = isinstance(field, int | str) and not isinstance(field, bool)
    if not is_id or str(field).lstrip("0") != id_.lstrip("0"):
        yield "noted: id is not the image's"
    elif str(field) != id_:
        yield "noted: id without its leading zeros"


_PAGE = "https://hatefulmemeschallenge.com/"
RELEASE = Release(
    title="Hateful Memes",
    remedy=f"get it from {_PAGE} (if the download is gone, ask Meta for access)",
    sample_root="hatefulmemes/data",
    lists=(TRAIN,),
    optional_lists=_DEV + _TEST,
    image_folders=("img",),
    image_archives=("img.tar.gz", "img.zip"),
    subfolders=("data",),
    inner_folders=("img",),
    any_subfolder=True,
)
READER = base.Reader(RELEASE.locate, RELEASE.compute_signature, open_hatefulmemes)
