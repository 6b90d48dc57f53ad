"""Writes and loads the columns of a prepared data set."""

import csv
import hashlib
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ccu_jax.config.schema import Data
from ccu_jax.data.near_duplicates import connected_components, find_clusters
from ccu_jax.data.preparation.ingest import iterate_rows
from ccu_jax.data.readers.base import Counts, Progress, Source, digest
from ccu_jax.data.tokenizer import encode, train_tokenizer
from ccu_jax.errors import UserError
from ccu_jax.storage.columns import ColumnWriter

MAPPED_COLUMNS = ("image", "text")
_ROW_FIELDS = ("has_image", "has_text", "id", "group", "split")
LOADED_COLUMNS = ("labels", *_ROW_FIELDS, "cluster")
MAX_CLASSES = 10_000
_EXTRA_FILES = ("tokenizer.json", "rows.tsv")
_CHUNK = 1024  # rows
_STAGE = "tokenizing texts"


def load_columns(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Loads all columns of a prepared folder; the large ones are memory-mapped."""
    mapped = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in MAPPED_COLUMNS
    }
    return mapped | {name: np.load(folder / f"{name}.npy") for name in LOADED_COLUMNS}


def write_columns(
    folder: pathlib.Path,
    source: Source,
    config: Data,
    counts: Counts,
    progress: Progress,
) -> dict[str, Any]:
    """Writes all columns except the images, and returns the metadata to store.

    Raises UserError if no row is usable, the train split is empty, or the number of
    classes is out of range.
    """
    _write_row_columns(folder)
    has_image = np.load(folder / "has_image.npy")
    num_rows = len(has_image)
    _check_trainable(np.load(folder / "split.npy"), source, counts)
    vocabulary = _write_texts_and_labels(folder, source, config, num_rows, progress)
    cluster = find_clusters(folder / "image.npy", has_image, progress)
    np.save(folder / "cluster.npy", cluster)
    num_duplicates = int((cluster != np.arange(num_rows)).sum())
    counts.add("noted: near-duplicate image", num_duplicates)
    np.save(folder / "group.npy", _merge_groups(folder, config.group, cluster))
    _write_table(folder, source.classes)
    counts.add("used", num_rows)
    return {
        "vocabulary": vocabulary,
        "classes": source.classes,
        "multi_label": source.multi_label,
        "metric": source.metric,
        "counts": counts.numbers,
        "fingerprint": hash_columns(folder, source.classes, sync=True),
        "files": _hash_extra_files(folder),
    }


def _write_row_columns(folder: pathlib.Path) -> None:
    columns: dict[str, list[Any]] = {name: [] for name in _ROW_FIELDS}
    for row in iterate_rows(folder):
        row |= {"has_image": row["image"], "has_text": row["text"] is not None}
        for name, values in columns.items():
            values.append(row[name])
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", np.array(values))


def _check_trainable(split: np.ndarray, source: Source, counts: Counts) -> None:
    """Raises UserError if the train split is empty or the classes are out of range."""
    num_classes = len(source.classes)
    if not len(split):
        raise counts.no_rows_error()
    if "train" not in split:
        raise UserError(
            f"{counts.origin}: no usable row in the train split; add training rows"
        )
    if num_classes > MAX_CLASSES:
        raise UserError(
            f"{counts.origin}: {num_classes:,} classes, at most {MAX_CLASSES:,} are "
            "supported; check that the labels are class names, not row names"
        )
    min_classes = 1 if source.multi_label else 2
    if num_classes < min_classes:
        raise UserError(
            f"{counts.origin}: {num_classes} classes, at least {min_classes} needed; "
            "check the labels of the data"
        )


def _write_texts_and_labels(
    folder: pathlib.Path,
    source: Source,
    config: Data,
    num_rows: int,
    progress: Progress,
) -> int:
    """Writes `text.npy` and `labels.npy` and returns the vocabulary size."""
    progress(_STAGE, 0, num_rows)
    training = (r["text"] for r in iterate_rows(folder) if r["split"] == "train")
    tokenizer = train_tokenizer(filter(None, training), config.vocabulary)
    # Not `tokenizer.save`, whose errors do not name the file.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    length, num_classes = config.text_length, len(source.classes)
    with (
        ColumnWriter(folder / "text.npy", np.int32, (length,)) as text_column,
        ColumnWriter(folder / "labels.npy", np.float32, (num_classes,)) as label_column,
    ):
        rows = iterate_rows(folder)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            progress(_STAGE, text_column.num_rows, num_rows)
            text_column.append(encode(tokenizer, [r["text"] for r in chunk], length))
            labels = np.zeros((len(chunk), num_classes), np.float32)
            for label, row in zip(labels, chunk, strict=True):
                label[row["labels"]] = 1
            label_column.append(labels)
    progress(_STAGE, num_rows, num_rows)
    return tokenizer.get_vocab_size()


def _merge_groups(folder: pathlib.Path, rule: str, cluster: np.ndarray) -> np.ndarray:
    """Merges groups that share texts or near-duplicates; returns each row's group."""
    group = np.load(folder / "group.npy")
    rows = np.arange(len(group))
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    pairs = [np.stack([first[inverse], rows], 1)]
    if rule == "image":
        pairs.append(np.stack([cluster, rows], 1))
    elif rule == "text":
        first_row: dict[str, int] = {}
        same_text = [
            (first_row.setdefault(digest(" ".join(row["text"].lower().split())), n), n)
            for n, row in enumerate(iterate_rows(folder))
            if row["text"]
        ]
        pairs.append(np.array(same_text, np.int64).reshape(-1, 2))
    return group[connected_components(len(group), np.concatenate(pairs))]


def _write_table(folder: pathlib.Path, classes: Sequence[str]) -> None:
    """Writes `rows.tsv`, in which users look up the ids of images to unlearn."""
    labels = np.load(folder / "labels.npy", mmap_mode="r")
    columns = (np.load(folder / f"{name}.npy") for name in ("id", "split", "group"))
    has = (np.load(folder / f"has_{name}.npy") for name in ("image", "text"))
    with (folder / "rows.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(("id", "split", "group", "labels", "image", "text"))
        for label, *row, image, text in zip(labels, *columns, *has, strict=True):
            names = "|".join(classes[int(index)] for index in np.flatnonzero(label))
            yes_no = ("yes" if value else "no" for value in (image, text))
            table.writerow([*row, names, *yes_no])


def is_intact(folder: pathlib.Path, meta: dict[str, Any]) -> bool:
    """Returns whether all files of a prepared folder match their checksums."""
    try:
        same = hash_columns(folder, meta["classes"]) == meta["fingerprint"]
        return same and meta["files"] == _hash_extra_files(folder)
    except OSError:
        return False


def hash_columns(
    folder: pathlib.Path, classes: Sequence[str], sync: bool = False
) -> str:
    """Hashes the classes and all columns; `sync` also flushes the columns to disk."""
    state = hashlib.blake2b("\0".join(classes).encode(), digest_size=16)
    for name in (*MAPPED_COLUMNS, *LOADED_COLUMNS):
        with (folder / f"{name}.npy").open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
            if sync:
                os.fsync(file.fileno())
    return state.hexdigest()


def _hash_extra_files(folder: pathlib.Path) -> dict[str, str]:
    digests = {}
    for name in _EXTRA_FILES:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
