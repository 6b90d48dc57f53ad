"""The one pass over a data set's rows: read, check, decode, store; in parts.

Each part ends with a line in a journal. After a kill the pass goes on behind the last
part whose line is whole, so no finished work is repeated; memory holds one part.
"""

import collections
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ccu_jax.config import Data
from ccu_jax.data import pictures
from ccu_jax.data.columns import Column
from ccu_jax.data.records import Records
from ccu_jax.data.source import Counts, Example, Progress, Source, Unusable

PART_ROWS = 4096
PART_BYTES = 64 << 20  # encoded pictures of a part
_JOURNAL = "journal.jsonl"
_ROWS = "rows.jsonl"
WORK = (_JOURNAL, _ROWS)  # files that nobody needs once all columns are written
_AHEAD = 64  # rows that are read and decoded ahead


class Loaded(NamedTuple):
    """An example, its picture as a square `[S, S, 3]` or None."""

    example: Example
    square: np.ndarray | None


class _Mark(NamedTuple):
    """How far the pass has come: a line of the journal."""

    key: int = 0  # the next of `Source.keys`
    rows: int = 0
    bytes: int = 0  # of rows.jsonl
    sizes: tuple[int, ...] = ()  # rows of each part
    counts: dict[str, int] | None = None


def collect(
    source: Source,
    scratch: pathlib.Path,
    config: Data,
    counts: Counts,
    progress: Progress,
    records: Records | None,
) -> list[int]:
    """Fills `scratch` with `image.npy` and `rows.jsonl`, from where it was left off.

    Args:
        source: The opened data set.
        scratch: A folder for this pass alone, new or left by a killed one.
        config: Size of the pictures, and whether margins are cut off.
        counts: Told of the rows that cannot be used; these are left out.
        progress: Called with (what, done, total).
        records: Where the pictures are also kept as they came; None: nowhere.

    Returns:
        The number of used rows of each part.

    Raises:
        UserError: a row that cannot be used, where all must be.
        records.Damaged: the source reads records, and they are damaged.
    """
    mark = _last(scratch)
    if mark.counts is not None:
        counts.numbers = mark.counts
    size, total = config.image_size, len(source.keys)
    column = {name: number for number, name in enumerate(source.classes)}
    shape, path = (size, size, 3), scratch / "image.npy"
    with (
        Column(path, np.uint8, shape, mark.rows) as squares,
        _open_at(scratch / _ROWS, mark.bytes) as lines,
        (scratch / _JOURNAL).open("ab") as journal,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        loaded = _load(source, pool, config, mark.key)
        while mark.key < total:
            part = []
            for where, got in _until_full(loaded):
                mark = mark._replace(key=mark.key + 1)
                progress("reading and decoding", mark.key, total)
                if isinstance(got, Unusable):
                    counts.skip(str(got), where)
                    continue
                for note in got.example.notes:
                    counts.add(note)
                blank = np.zeros(shape, np.uint8)
                squares.add((blank if got.square is None else got.square)[None])
                lines.write(_line(got.example, column))
                part.append(got.example)
            if records is not None:
                records.write(len(mark.sizes), part)
            squares.sync()
            _sync(lines)
            sizes = (*mark.sizes, len(part))
            mark = _Mark(mark.key, squares.rows, lines.tell(), sizes, counts.numbers)
            journal.write(json.dumps(mark._asdict()).encode() + b"\n")
            _sync(journal)
        return list(mark.sizes)


def rows(scratch: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The stored rows, without their pictures: id, group, split, labels, image, text.

    `labels` are numbers of classes, `image` tells whether there is a picture.
    """
    with (scratch / _ROWS).open("rb") as file:
        for line in file:
            yield json.loads(line)


def _line(example: Example, column: dict[str, int]) -> bytes:
    row = {
        "id": example.id,
        "group": example.group,
        "split": example.split,
        "labels": [column[label] for label in example.labels],
        "image": example.image is not None,
        "text": example.text,
    }
    return json.dumps(row).encode() + b"\n"


def _load(
    source: Source, pool: ThreadPoolExecutor, config: Data, first: int
) -> Iterator[tuple[str, Loaded | Unusable]]:
    """Every row from `first` on in order, several read and decoded ahead."""

    def load(key: Any) -> Loaded | Unusable:
        try:
            example = source.read(key)
            return decoded(example, config)
        except Unusable as reason:
            return reason

    ahead: collections.deque = collections.deque()
    for index in range(first, len(source.keys)):
        key = source.keys[index]
        ahead.append((key, pool.submit(load, key)))
        if len(ahead) >= _AHEAD:
            key, future = ahead.popleft()
            yield source.name(key), future.result()
    for key, future in ahead:
        yield source.name(key), future.result()


def decoded(example: Example, config: Data) -> Loaded:
    """The example with its picture as a square, and what there is to tell of it."""
    if example.image is None:
        return Loaded(example, None)
    square, notes = pictures.decode(example.image, config.image_size, config.trim)
    return Loaded(example._replace(notes=example.notes + notes), square)


def _until_full(loaded: Iterable) -> Iterator:
    """The next rows, as many as make a part."""
    size = 0
    for where, got in itertools.islice(loaded, PART_ROWS):
        yield where, got
        if isinstance(got, Loaded):
            size += len(got.example.image or b"")
        if size >= PART_BYTES:
            return


def _last(scratch: pathlib.Path) -> _Mark:
    """The last whole line of the journal, which is cut off behind it."""
    path, mark, end = scratch / _JOURNAL, _Mark(), 0
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                mark = _Mark(**json.loads(line))
            except ValueError:
                break
            end += len(line)
        os.truncate(path, end)
    return mark


def _open_at(path: pathlib.Path, end: int):
    file = path.open("r+b" if end else "wb")
    file.seek(end)
    file.truncate()
    return file


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
