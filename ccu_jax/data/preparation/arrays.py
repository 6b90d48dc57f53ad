"""The columns of a prepared data set, written from the ingested rows."""

import collections
import contextlib
import csv
import hashlib
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ccu_jax.config.schema import Data
from ccu_jax.data.near_duplicates import connected_components, find_clusters
from ccu_jax.data.preparation.ingest import iterate_rows
from ccu_jax.data.readers.base import Counts, Progress, Source, digest
from ccu_jax.data.tokenizer import encode, train_tokenizer
from ccu_jax.errors import UserError
from ccu_jax.storage.columns import ColumnWriter

MAPPED = ("image", "text")
LOADED = ("labels", "has_image", "has_text", "id", "group", "split", "cluster")
MAX_CLASSES = 10_000
_EXTRA_FILES = ("tokenizer.json", "rows.tsv")
_CHUNK = 1024  # rows
_STAGE = "tokenizing texts"


def load_columns(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Loads all columns of a prepared folder; the large ones are memory-mapped."""
    mapped = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in MAPPED}
    return mapped | {name: np.load(folder / f"{name}.npy") for name in LOADED}


def write_columns(
    folder: pathlib.Path,
    source: Source,
    config: Data,
    counts: Counts,
    progress: Progress,
) -> dict[str, Any]:
    """Writes all columns but the images, which `ingest_rows` has written.

    Returns:
        The metadata to store: vocabulary size, classes, counts and checksums.

    Raises:
        UserError: no usable row, no training row, or an unusable number of classes.
    """
    num_rows = _check_rows(folder, source, counts)
    progress(_STAGE, 0, num_rows)
    vocabulary = _write_row_columns(folder, source, config, num_rows, progress)
    has_image = np.load(folder / "has_image.npy")
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
        "fingerprint": fingerprint(folder, source.classes, sync=True),
        "files": _digests_of_extras(folder),
    }


def _check_rows(folder: pathlib.Path, source: Source, counts: Counts) -> int:
    """Returns the number of rows, or raises if they cannot be trained on."""
    num_rows, has_training_row = 0, False
    for row in iterate_rows(folder):
        num_rows += 1
        has_training_row |= row["split"] == "train"
    num_classes = len(source.classes)
    if not num_rows:
        raise counts.no_rows_error()
    if not has_training_row:
        raise UserError(f"{counts.origin}: no usable row in the train split")
    if num_classes > MAX_CLASSES:
        raise UserError(
            f"{counts.origin}: {num_classes:,} classes, at most {MAX_CLASSES:,} are "
            "supported; check that labels are classes and not names of single rows"
        )
    min_classes = 1 if source.multi_label else 2
    if num_classes < min_classes:
        raise UserError(
            f"{counts.origin}: {num_classes} classes, at least {min_classes} needed; "
            "check the labels of the data"
        )
    return num_rows


def _write_row_columns(
    folder: pathlib.Path,
    source: Source,
    config: Data,
    num_rows: int,
    progress: Progress,
) -> int:
    """Writes the columns that depend on single rows; returns the vocabulary size."""
    training = (r["text"] for r in iterate_rows(folder) if r["split"] == "train")
    tokenizer = train_tokenizer(filter(None, training), config.vocabulary)
    # Not `tokenizer.save`, whose errors do not name the file.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    max_length: collections.Counter[str] = collections.Counter()
    for row in iterate_rows(folder):
        for name in ("id", "group", "split"):
            max_length[name] = max(max_length[name], len(row[name]), 1)
    types: dict[str, tuple[Any, tuple[int, ...]]] = {
        "text": (np.int32, (config.text_length,)),
        "labels": (np.float32, (len(source.classes),)),
        "has_image": (np.bool_, ()),
        "has_text": (np.bool_, ()),
        **{name: (f"<U{max_length[name]}", ()) for name in ("id", "group", "split")},
    }
    with contextlib.ExitStack() as stack:
        columns = {
            name: stack.enter_context(ColumnWriter(folder / f"{name}.npy", *type_))
            for name, type_ in types.items()
        }
        rows, start = iterate_rows(folder), 0
        while chunk := list(itertools.islice(rows, _CHUNK)):
            progress(_STAGE, start, num_rows)
            _append_chunk(columns, chunk, config, tokenizer, len(source.classes))
            start += _CHUNK
        for column in columns.values():
            column.sync()
    progress(_STAGE, num_rows, num_rows)
    return tokenizer.get_vocab_size()


def _append_chunk(
    columns: Mapping[str, ColumnWriter],
    chunk: Sequence[dict[str, Any]],
    config: Data,
    tokenizer: Tokenizer,
    num_classes: int,
) -> None:
    labels = np.zeros((len(chunk), num_classes), np.float32)
    for index, row in enumerate(chunk):
        labels[index, row["labels"]] = 1
    texts = [row["text"] for row in chunk]
    columns["text"].append(encode(tokenizer, texts, config.text_length))
    columns["labels"].append(labels)
    columns["has_image"].append(np.array([row["image"] for row in chunk]))
    columns["has_text"].append(np.array([text is not None for text in texts]))
    for name in ("id", "group", "split"):
        values = np.array([row[name] for row in chunk], columns[name].dtype)
        columns[name].append(values)


def _merge_groups(folder: pathlib.Path, rule: str, cluster: np.ndarray) -> np.ndarray:
    """Merges groups that share a text or a near-duplicate image, by `data.group`.

    A merged group has the name of its first row's group.
    """
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
    """Writes `rows.tsv`, in which users look up the ids to forget."""
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
    """Returns whether all files of a prepared folder match their checksums.

    It reads all of them, at about one GB per second.
    """
    try:
        same = fingerprint(folder, meta["classes"]) == meta["fingerprint"]
        return same and meta["files"] == _digests_of_extras(folder)
    except OSError:
        return False


def fingerprint(
    folder: pathlib.Path, classes: Sequence[str], sync: bool = False
) -> str:
    """Hashes the classes and all columns; with `sync` also flushes them to the disk."""
    state = hashlib.blake2b("\0".join(classes).encode(), digest_size=16)
    for name in (*MAPPED, *LOADED):
        with (folder / f"{name}.npy").open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
            if sync:
                os.fsync(file.fileno())
    return state.hexdigest()


def _digests_of_extras(folder: pathlib.Path) -> dict[str, str]:
    """Hashes the files beside the columns."""
    digests = {}
    for name in _EXTRA_FILES:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
