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

from ccu_jax.config.schema import Data
from ccu_jax.data.preparation import images as pictures
from ccu_jax.data.preparation.tfds_builders import Records
from ccu_jax.data.readers.base import Counts, Example, Progress, SkipExample, Source
from ccu_jax.storage.columns import ColumnWriter

PART_ROWS = 4096
PART_BYTES = 64 << 20  # encoded pictures of a part
_JOURNAL = "journal.jsonl"
_ROWS = "rows.jsonl"
WORK = (_JOURNAL, _ROWS)  # files that nobody needs once all columns are written


class Decoded(NamedTuple):
    """An example with its decoded image `[S, S, 3]`; zeros if it has none."""

    example: Example
    image: np.ndarray


class _JournalEntry(NamedTuple):
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
    mark = _last(scratch, config.image_size)
    if mark.counts is not None:
        counts.numbers = mark.counts
    size, total = config.image_size, len(source.keys)
    shape, path = (size, size, 3), scratch / "image.npy"
    with (
        ColumnWriter(path, np.uint8, shape, mark.rows) as squares,
        _open_at(scratch / _ROWS, mark.bytes) as lines,
        (scratch / _JOURNAL).open("ab") as journal,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        store = _Store(squares, lines, source.classes, counts)
        loaded = _load(source, pool, config, mark.key)
        while mark.key < total:
            part, before = [], squares.num_rows
            for where, got in _until_full(loaded):
                mark = mark._replace(key=mark.key + 1)
                progress("reading and decoding", mark.key, total)
                example = store.add(where, got)
                if example and records is not None:
                    part.append(example)
            if records is not None:
                records.write(len(mark.sizes), part)
            squares.sync()
            _sync(lines)
            sizes = (*mark.sizes, squares.num_rows - before)
            mark = _JournalEntry(
                mark.key, squares.num_rows, lines.tell(), sizes, counts.numbers
            )
            journal.write(json.dumps(mark._asdict()).encode() + b"\n")
            _sync(journal)
        return list(mark.sizes)


class _Store:
    """Where rows go, and their counts."""

    def __init__(self, squares: ColumnWriter, lines, classes, counts: Counts):
        self._squares, self._lines, self._counts = squares, lines, counts
        self._column = {name: number for number, name in enumerate(classes)}

    def add(self, where: str, got: Decoded | SkipExample) -> Example | None:
        """Stores a row and gives it back, or counts why it cannot be used."""
        if isinstance(got, SkipExample):
            self._counts.skip(str(got), where)
            return None
        for note in got.example.notes:
            self._counts.add(note)
        self._squares.append(got.image[None])
        self._lines.write(_line(got.example, self._column))
        return got.example


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
) -> Iterator[tuple[str, Decoded | SkipExample]]:
    """Every row from `first` on in order, several read and decoded ahead."""

    def load(key: Any) -> Decoded | SkipExample:
        try:
            example = source.read(key)
            return decoded(example, config)
        except SkipExample as reason:
            return reason

    # Few, for each may be large.
    ahead: collections.deque = collections.deque()
    most = 4 * pool._max_workers
    for index in range(first, len(source.keys)):
        key = source.keys[index]
        ahead.append((key, pool.submit(load, key)))
        if len(ahead) >= most:
            key, future = ahead.popleft()
            yield source.row_name(key), future.result()
    for key, future in ahead:
        yield source.row_name(key), future.result()


def decoded(example: Example, config: Data) -> Decoded:
    """The example with its picture as a square, and what there is to tell of it."""
    if example.image is None:
        blank = np.zeros((config.image_size, config.image_size, 3), np.uint8)
        return Decoded(example, blank)
    square, notes = pictures.decode(
        example.image, config.image_size, config.crop_margins
    )
    return Decoded(example._replace(notes=example.notes + notes), square)


def _until_full(loaded: Iterable) -> Iterator:
    """The next rows, as many as make a part."""
    size = 0
    for where, got in itertools.islice(loaded, PART_ROWS):
        yield where, got
        if isinstance(got, Decoded):
            size += len(got.example.image or b"")
        if size >= PART_BYTES:
            return


def done(scratch: pathlib.Path) -> list[int]:
    """The number of rows of each part that a pass has finished."""
    return list(_last(scratch).sizes)


def _last(scratch: pathlib.Path, size: int = 0) -> _JournalEntry:
    """The last whole line of the journal, which is cut off behind it.

    None of it counts where the files are shorter than it says.
    """
    path, mark, end = scratch / _JOURNAL, _JournalEntry(), 0
    if not path.exists():
        return mark
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            mark = _JournalEntry(**json.loads(line))
        except (ValueError, TypeError):
            break
        end += len(line)
    try:
        image, rows = ((scratch / n).stat().st_size for n in ("image.npy", _ROWS))
    except OSError:
        image = rows = -1
    if image < mark.rows * 3 * size * size or rows < mark.bytes:
        mark, end = _JournalEntry(), 0
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
