"""Checks properties that hold for data sets, archives and images of any content."""

import os
import pathlib
import re
import stat
from typing import Any

import numpy as np

from ccu_jax.config.schema import Data
from ccu_jax.data import load
from ccu_jax.data.preparation import images
from ccu_jax.data.readers import archives
from ccu_jax.data.readers.base import (
    SPLITS,
    Counts,
    Example,
    SkipExample,
    Source,
    digest,
)
from ccu_jax.errors import UserError
from ccu_jax.unlearn_sets import splits
from tests.data.readers.layouts import compute_signature, ignore_progress, read_rows
from tests.fuzz.contents import SECRET
from tests.fuzz.data_sets import Case
from tests.fuzz.sandbox import Failure, Sandbox, watch

_MAX_MESSAGE = 1500  # characters
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # a text may have several lines
_SIZES = {"image_size": 8, "text_length": 4, "vocabulary": 100}


def check_message(sandbox: Sandbox, error: UserError) -> str:
    """Returns a message without absolute paths; raises Failure if it is unprintable."""
    message = str(error)
    # Bytes of file names are escaped when they are printed.
    garbled = _CONTROL.search(re.sub("[\udc80-\udcff]", "", message))
    if SECRET in message or not 0 < len(message) <= _MAX_MESSAGE or garbled:
        raise Failure(f"unprintable or too long message: {message[:3000]!r}")
    message = message.replace(str(sandbox.root), "ROOT")
    return message.replace(str(sandbox.work), "WORK")


def check_counts(names) -> None:
    """Raises Failure if a name of a count, shown in reports, has file contents."""
    for name in names:
        is_plain = name.isascii() and name.isprintable()
        if SECRET in name or len(name) > 90 or not is_plain:
            raise Failure(f"unsafe name of a count: {name!r}")


def check_example(example: Example, source: Source) -> None:
    """Raises Failure if a field of an example is invalid or contains a secret."""
    text, labels = example.text, example.labels
    for word in (example.id, example.group, *labels):
        is_stripped = word and word == word.strip()
        if not is_stripped or _CONTROL.search(word) or SECRET in word:
            raise Failure(f"name changes if written to a file: {word!r}")
        if str(np.array([word])[0]) != word:
            raise Failure(f"name changes if stored in an array: {word!r}")
    if f"{example.id} ".startswith("# "):
        raise Failure(f"id would be a comment in a list of ids: {example.id!r}")
    if text is not None and (not text.strip() or _NOT_TEXT.search(text)):
        raise Failure(f"text changes if written to a file: {text!r}")
    if SECRET in (text or "") or SECRET.encode() in (example.image or b""):
        raise Failure("a secret file was read")
    if example.image is None and text is None:
        raise Failure("row without image and text")
    if example.split not in SPLITS or not set(labels) <= set(source.classes):
        raise Failure(f"unknown split or label: {example.split!r} {labels!r}")
    if len(set(labels)) != (len(labels) if source.multi_label else 1):
        raise Failure(f"repeated or missing label: {labels!r}")
    check_counts(example.notes)


def read_case(
    sandbox: Sandbox, case: Case, *, strict: bool = False, store: bool = False
) -> dict[str, int]:
    """Writes and reads a data set; `store` also prepares it for training.

    Returns the counts, or the error message as a key; raises Failure.
    """
    sandbox.write(case.tree)
    settings: dict[str, Any] = _SIZES | case.settings | {"strict": strict}
    config = Data(dataset=case.dataset, dir=str(sandbox.root), **settings)
    try:
        with watch(sandbox):
            counts = _read_rows(sandbox, config)
            if store:
                counts |= {"stored": 1, **_store(sandbox, config)}
    except UserError as error:
        return {"error: " + check_message(sandbox, error): 1}
    check_counts(counts)
    return counts


def _read_rows(sandbox: Sandbox, config: Data) -> dict[str, int]:
    """Reads all rows of a data set, checks them and returns the counts."""
    archive_counts = Counts(str(sandbox.root), config.strict)

    def unpack(path: pathlib.Path) -> pathlib.Path:
        folder = sandbox.work / "unpacked" / digest(str(path))
        return archives.unpack(path, folder, archive_counts, ignore_progress)

    if compute_signature(config) != compute_signature(config):
        raise Failure("two signatures for the same files")
    source, examples, counts = read_rows(config, unpack=unpack)
    for example in examples.values():
        check_example(example, source)
    skipped = [n for name, n in counts.items() if name.startswith("skipped: ")]
    if counts.get("read", 0) != len(examples) + sum(skipped):
        raise Failure(f"counts do not add up to {len(examples)} used rows: {counts}")
    counts |= archive_counts.numbers
    return counts | {"used": len(examples)} if examples else counts


def _store(sandbox: Sandbox, config: Data) -> dict[str, int]:
    """Prepares the data and checks that lists of ids can be written and read."""
    data, lists = load(config, sandbox.work, ignore_progress), sandbox.work / "lists"
    lists.mkdir()
    if len(set(data.id.tolist())) != len(data.id):
        raise Failure("repeated id in the stored columns")
    train, test = (np.flatnonzero(data.split == name) for name in ("train", "test"))
    sets = splits.Sets(train, train, test, test, test)
    text = splits.format_unlearn_set(data, sets, 0, "random:0.1")
    (lists / "0.txt").write_bytes(text.encode("utf-8"))
    splits.format_near_duplicates(data, sets, {"train": train}).encode("utf-8")
    ids = splits.load_all_ids(data, lists, "report")
    if ids != set(data.id[train].tolist()):
        raise Failure(f"ids read {ids}, written {data.id[train].tolist()}")
    return data.counts


def unpack_archive(sandbox: Sandbox, data: bytes, strict: bool) -> dict[str, int]:
    """Unpacks an archive; returns counts, like `read_case`; raises Failure."""
    path, folder = sandbox.root / "a", sandbox.work / "below" / "new"
    path.write_bytes(data)
    counts = Counts("here", strict)
    try:
        with watch(sandbox):
            archives.unpack(path, folder, counts, ignore_progress)
    except UserError as error:
        if folder.parent.exists() and os.listdir(folder.parent):
            raise Failure(f"files left: {os.listdir(folder.parent)}") from None
        message = check_message(sandbox, error)
        return {"error: " + re.sub(r"damaged \(.*\)", "damaged", message): 1}
    check_counts(counts.numbers)
    if sorted(os.listdir(folder.parent)) != ["new", "new.json"]:
        raise Failure(f"unexpected files: {os.listdir(folder.parent)}")
    num_files = 0
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = os.lstat(os.path.join(parent, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or mode & 0o7022:
                raise Failure(f"unpacked {name!r} with mode {mode:o}")
        num_files += len(names)
    if os.listdir(sandbox.root) != ["a"]:
        raise Failure(f"unexpected files: {os.listdir(sandbox.root)}")
    return counts.numbers | ({"unpacked a file": num_files} if num_files else {"-": 1})


def decode_image(
    sandbox: Sandbox, data: bytes, size: int, crop_margins: bool
) -> dict[str, int]:
    """Decodes an image; returns counts, like `read_case`; raises Failure."""
    with watch(sandbox):
        try:
            pixels, notes = images.decode(data, size, crop_margins)
        except SkipExample as reason:
            check_counts([str(reason)])
            return {f"skipped: {reason}": 1}
    if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8:
        raise Failure(f"image of shape {pixels.shape} and type {pixels.dtype}")
    check_counts(notes)
    return {"decoded": 1, **dict.fromkeys(notes, 1)}
