"""Reads, decodes and stores the rows of a data set, one shard at a time.

After each shard a line is appended to a journal. A killed pass resumes after the last
shard whose line is complete, so no shard is read twice. Only one shard is in memory.
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
from ccu_jax.data.preparation import images
from ccu_jax.data.preparation.tfds_builders import RecordStore
from ccu_jax.data.readers.base import Counts, Example, Progress, SkipExample, Source
from ccu_jax.storage.columns import ColumnWriter

SHARD_ROWS = 4096
SHARD_BYTES = 64 << 20  # of encoded images
_JOURNAL = "journal.jsonl"
_ROWS = "rows.jsonl"
WORK_FILES = (_JOURNAL, _ROWS)  # not needed once all columns are written
_MAX_THREADS = 8


class DecodedExample(NamedTuple):
    """An example with its decoded image `[S, S, 3]`, or zeros if it has no image."""

    example: Example
    image: np.ndarray


class _JournalEntry(NamedTuple):
    """A line of the journal: the state of the pass after a shard."""

    key: int = 0  # index into `Source.keys` of the next row to read
    rows: int = 0
    bytes: int = 0  # of rows.jsonl
    sizes: tuple[int, ...] = ()  # rows of each shard
    counts: dict[str, int] | None = None


def ingest_rows(
    source: Source,
    scratch: pathlib.Path,
    config: Data,
    counts: Counts,
    progress: Progress,
    records: RecordStore | None,
) -> list[int]:
    """Writes `image.npy`, `rows.jsonl` and the records, resuming a killed pass.

    Returns the number of usable rows in each shard. Raises UserError if a row cannot be
    used and `data.strict` is on, and DamagedRecordsError if stored records are damaged.
    """
    entry = _recover_journal(scratch, config.image_size, records)
    if entry.counts is not None:
        counts.numbers = entry.counts
    shape, total = (config.image_size, config.image_size, 3), len(source.keys)
    class_index = {name: index for index, name in enumerate(source.classes)}
    with (
        ColumnWriter(scratch / "image.npy", np.uint8, shape, entry.rows) as column,
        ColumnWriter(scratch / _ROWS, np.uint8, (), entry.bytes) as lines,
        (scratch / _JOURNAL).open("ab") as journal,
        ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool,
    ):
        results = _decode_ahead(source, pool, config, entry.key)
        while entry.key < total:
            examples, rows_before = [], column.num_rows
            for row_name, result in _take_shard(results):
                entry = entry._replace(key=entry.key + 1)
                progress("reading and decoding", entry.key, total)
                if isinstance(result, SkipExample):
                    counts.skip(str(result), row_name)
                    continue
                _append_row(result, column, lines, class_index, counts)
                if records is not None:
                    examples.append(result.example)
            if records is not None:
                records.write_shard(len(entry.sizes), examples)
            column.sync()
            lines.sync()
            sizes = (*entry.sizes, column.num_rows - rows_before)
            positions = (entry.key, column.num_rows, lines.num_rows)
            entry = _JournalEntry(*positions, sizes, counts.numbers)
            journal.write(json.dumps(entry._asdict()).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        return list(entry.sizes)


def _append_row(
    decoded: DecodedExample,
    column: ColumnWriter,
    lines: ColumnWriter,
    class_index: dict[str, int],
    counts: Counts,
) -> None:
    """Appends a row to the image column and to `rows.jsonl`, and counts its notes."""
    example = decoded.example
    for note in example.notes:
        counts.add(note)
    row = {
        "id": example.id,
        "group": example.group,
        "split": example.split,
        "labels": [class_index[label] for label in example.labels],
        "image": example.image is not None,
        "text": example.text,
    }
    column.append(decoded.image[None])
    lines.append(np.frombuffer(json.dumps(row).encode() + b"\n", np.uint8))


def iterate_rows(scratch: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the rows that `ingest_rows` stored, without their images.

    `text` is None if missing, `labels` are class indices, and `image` tells whether the
    row has an image.
    """
    with (scratch / _ROWS).open("rb") as file:
        for line in file:
            yield json.loads(line)


def _decode_ahead(
    source: Source, pool: ThreadPoolExecutor, config: Data, start: int
) -> Iterator[tuple[str, DecodedExample | SkipExample]]:
    """Yields (row name, result) from row `start` on, decoding ahead in the pool."""

    def decode(key: Any) -> DecodedExample | SkipExample:
        try:
            example = source.read(key)
            if example.image is None:
                return DecodedExample(example, np.zeros((size, size, 3), np.uint8))
            pixels, notes = images.decode(example.image, size, config.crop_margins)
        except SkipExample as reason:
            return reason
        return DecodedExample(example._replace(notes=example.notes + notes), pixels)

    size = config.image_size
    keys = itertools.islice(source.keys, start, None)
    # Decode only a few rows ahead: an image may be large.
    first = itertools.islice(keys, 4 * pool._max_workers)
    queue = collections.deque((key, pool.submit(decode, key)) for key in first)
    while queue:
        key, future = queue.popleft()
        yield source.row_name(key), future.result()
        for key in itertools.islice(keys, 1):
            queue.append((key, pool.submit(decode, key)))


def _take_shard(
    results: Iterable[tuple[str, DecodedExample | SkipExample]],
) -> Iterator[tuple[str, DecodedExample | SkipExample]]:
    """Yields results until a shard is full, by number of rows or encoded bytes."""
    num_bytes = 0
    for row_name, result in itertools.islice(results, SHARD_ROWS):
        yield row_name, result
        if isinstance(result, DecodedExample):
            num_bytes += len(result.example.image or b"")
        if num_bytes >= SHARD_BYTES:
            return


def _recover_journal(
    scratch: pathlib.Path, image_size: int, records: RecordStore | None
) -> _JournalEntry:
    """Truncates the journal after its last complete entry and returns that entry.

    If the columns are shorter than the entry says, or its records are missing, empties
    the journal and returns an empty entry, so that the pass starts over.
    """
    path, entry, end = scratch / _JOURNAL, _JournalEntry(), 0
    if not path.exists():
        return entry
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = _JournalEntry(**json.loads(line))
        except (ValueError, TypeError):
            break
        end += len(line)
    try:
        image_bytes = (scratch / "image.npy").stat().st_size
        row_bytes = (scratch / _ROWS).stat().st_size
    except OSError:
        image_bytes = row_bytes = -1
    has_records = records is None or records.has_shards(entry.sizes)
    is_short = image_bytes < entry.rows * 3 * image_size**2 or row_bytes < entry.bytes
    if is_short or not has_records:
        entry, end = _JournalEntry(), 0
    os.truncate(path, end)
    return entry
