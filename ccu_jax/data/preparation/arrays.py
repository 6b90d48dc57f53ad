"""The columns that training maps: made of the stored rows, a piece at a time."""

import collections
import contextlib
import csv
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ccu_jax.config.schema import Data
from ccu_jax.data import near_duplicates as duplicates
from ccu_jax.data.preparation import ingest as parts
from ccu_jax.data.readers.base import Counts, Progress, Source, digest
from ccu_jax.data.tokenizer import encode, train_tokenizer
from ccu_jax.errors import UserError
from ccu_jax.storage.columns import ColumnWriter

MAPPED = ("image", "text")
LOADED = ("labels", "has_image", "has_text", "id", "group", "split", "cluster")
MOST_CLASSES = 10_000
_CHUNK = 1024


def load(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All columns of a prepared folder, the large ones mapped."""
    found = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in MAPPED}
    return found | {name: np.load(folder / f"{name}.npy") for name in LOADED}


def finish(
    folder: pathlib.Path,
    source: Source,
    config: Data,
    counts: Counts,
    progress: Progress,
) -> dict[str, Any]:
    """Writes all columns but the pictures; gives what is to be stored about them.

    Args:
        folder: where `parts.collect` has left its files.
        source: the opened data set.
        config: lengths, vocabulary, what a group is.
        counts: told of near-duplicates and of the rows used.
        progress: called with (what, done, total).

    Raises:
        UserError: no row, no training row, or nothing to tell apart.
    """
    rows = _check(folder, source, counts)
    progress("tokenising texts", 0, rows)
    vocabulary = _columns(folder, source, config, rows, progress)
    has_image = np.load(folder / "has_image.npy")
    cluster = duplicates.find_clusters(folder / "image.npy", has_image, progress)
    np.save(folder / "cluster.npy", cluster)
    counts.add("noted: near-duplicate image", int((cluster != np.arange(rows)).sum()))
    group = _groups(folder, config.group, cluster)
    np.save(folder / "group.npy", group)
    _list(folder, source.classes)
    counts.add("used", rows)
    return {
        "vocabulary": vocabulary,
        "classes": source.classes,
        "multi_label": source.multi_label,
        "metric": source.metric,
        "counts": counts.numbers,
        "fingerprint": fingerprint(folder, source.classes, sync=True),
        "files": _digests_of_extras(folder),
    }


def _check(folder, source: Source, counts: Counts) -> int:
    rows, training = 0, False
    for row in parts.rows(folder):
        rows += 1
        training |= row["split"] == "train"
    if not rows:
        raise counts.no_rows_error()
    if not training:
        raise UserError(f"{counts.origin}: no usable row in the train split")
    if len(source.classes) > MOST_CLASSES:
        raise UserError(
            f"{counts.origin}: {len(source.classes):,} classes are more than the "
            f"{MOST_CLASSES:,} that can be told apart: is each label a name of its own?"
        )
    if len(source.classes) < (1 if source.multi_label else 2):
        raise UserError(
            f"{counts.origin}: {len(source.classes)} classes in all rows; there must be "
            "at least two to tell apart"
        )
    return rows


def _columns(folder, source: Source, config: Data, rows: int, progress) -> int:
    """Writes text, labels, what there is, id, group, split; gives the vocabulary."""
    training = (r["text"] for r in parts.rows(folder) if r["split"] == "train")
    tokenizer = train_tokenizer(filter(None, training), config.vocabulary)
    # Not by its own `save`, whose errors name no file.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    longest: collections.Counter = collections.Counter()
    for row in parts.rows(folder):
        for name in ("id", "group", "split"):
            longest[name] = max(longest[name], len(row[name]), 1)
    shapes: dict[str, tuple[Any, tuple]] = {
        "text": (np.int32, (config.text_length,)),
        "labels": (np.float32, (len(source.classes),)),
        "has_image": (np.bool_, ()),
        "has_text": (np.bool_, ()),
        **{name: (f"<U{longest[name]}", ()) for name in ("id", "group", "split")},
    }
    with contextlib.ExitStack() as stack:
        columns = {
            name: stack.enter_context(ColumnWriter(folder / f"{name}.npy", *shape))
            for name, shape in shapes.items()
        }
        _fill(columns, folder, source, config, tokenizer, rows, progress)
        for column in columns.values():
            column.sync()
    progress("tokenising texts", rows, rows)
    return tokenizer.get_vocab_size()


def _fill(columns, folder, source: Source, config: Data, tokenizer, rows, progress):
    for done, chunk in enumerate(_chunks(parts.rows(folder))):
        progress("tokenising texts", done * _CHUNK, rows)
        labels = np.zeros((len(chunk), len(source.classes)), np.float32)
        for place, row in enumerate(chunk):
            labels[place, row["labels"]] = 1
        texts = [row["text"] for row in chunk]
        columns["text"].append(encode(tokenizer, texts, config.text_length))
        columns["labels"].append(labels)
        columns["has_image"].append(np.array([row["image"] for row in chunk]))
        columns["has_text"].append(np.array([t is not None for t in texts]))
        for name in ("id", "group", "split"):
            values = np.array([row[name] for row in chunk], columns[name].dtype)
            columns[name].append(values)


def _chunks(rows: Iterator) -> Iterator[list]:
    while chunk := list(itertools.islice(rows, _CHUNK)):
        yield chunk


def _groups(folder, kind: str, cluster: np.ndarray) -> np.ndarray:
    """The groups by what the data say, joined where texts or pictures are alike.

    A joined group has the name of its first row's.
    """
    own = np.load(folder / "group.npy")
    _, first, which = np.unique(own, return_index=True, return_inverse=True)
    pairs = [np.stack([first[which], np.arange(len(own))], 1)]
    if kind == "image":
        pairs.append(np.stack([cluster, np.arange(len(own))], 1))
    elif kind == "text":
        seen: dict[str, int] = {}
        same = [
            (seen.setdefault(digest(" ".join(row["text"].lower().split())), n), n)
            for n, row in enumerate(parts.rows(folder))
            if row["text"]
        ]
        pairs.append(np.array(same, np.int64).reshape(-1, 2))
    return own[duplicates.connected_components(len(own), np.concatenate(pairs))]


def _list(folder, classes):
    """Writes `rows.tsv`: what there is, for people who look for ids to forget."""
    names = ("id", "split", "group", "labels", "image", "text")
    labels = np.load(folder / "labels.npy", mmap_mode="r")
    columns = (np.load(folder / f"{name}.npy") for name in ("id", "split", "group"))
    has = (np.load(folder / f"has_{name}.npy") for name in ("image", "text"))
    with (folder / "rows.tsv").open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, delimiter="\t", lineterminator="\n")
        lines.writerow(names)
        for label, *row, image, words in zip(labels, *columns, *has, strict=True):
            named = "|".join(classes[place] for place in np.flatnonzero(label))
            there = ("yes" if value else "no" for value in (image, words))
            lines.writerow([*row, named, *there])


def is_intact(folder: pathlib.Path, meta: dict[str, Any]) -> bool:
    """Whether all files of a prepared folder hold what was written into them.

    Reads all of it, which takes about a second for each GB.
    """
    try:
        same = fingerprint(folder, meta["classes"]) == meta["fingerprint"]
        return same and meta["files"] == _digests_of_extras(folder)
    except OSError:
        return False


def fingerprint(folder: pathlib.Path, classes: Sequence[str], sync=False) -> str:
    """A digest of the classes and of all columns; `sync`: and have them on the disk."""
    hashed = hashlib.blake2b("\0".join(classes).encode(), digest_size=16)
    for name in (*MAPPED, *LOADED):
        with (folder / f"{name}.npy").open("rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
            if sync:
                os.fsync(file.fileno())
    return hashed.hexdigest()


def _digests_of_extras(folder: pathlib.Path) -> dict[str, str]:
    """The digests of what is there beside the columns."""
    found = {}
    for name in ("tokenizer.json", "rows.tsv"):
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
