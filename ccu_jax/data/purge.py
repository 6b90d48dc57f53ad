"""Takes forgotten pictures out of all that a run keeps, and looks for their bytes.

A picture may lie there as a square of pixels (`data/`), as the file it came as
(`records/`, `unpacked/`, a sample edition), or in what a killed run has left. After
these are emptied, every file is searched for pieces of both forms. Files that are
compressed (checkpoints) are searched as they lie there; no pictures are put into them.
The user's own files are not touched.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ccu_jax.config import Data
from ccu_jax.data import prepare, records
from ccu_jax.data.columns import Rows
from ccu_jax.data.source import Example, Progress, Reader, Unusable

PIECE = 32  # bytes of a needle: long enough that chance does not bring them together
_VARIETY = 12  # different bytes that a needle must have: even areas tell nothing
_CHUNK = 8 << 20


class Needle(NamedTuple):
    """A piece of a picture of a row."""

    id: str
    piece: bytes


class Found(NamedTuple):
    """What a search for so many needles came to."""

    files: int
    bytes: int
    needles: int
    hits: tuple[tuple[str, str], ...]  # (id, file), each pair once


def pieces(data: bytes, first: int = 0, count: int = 3) -> list[bytes]:
    """Telling pieces of bytes, spread over what follows `first`."""
    found = []
    for place in range(1, count + 1):
        start = first + (len(data) - first) * place // (count + 1)
        # The first window from there on that is varied enough.
        for at in range(start, min(start + 64 * PIECE, len(data) - PIECE), PIECE):
            if len(set(data[at : at + PIECE])) >= _VARIETY:
                found.append(data[at : at + PIECE])
                break
    return found


def empty(
    config: Data,
    reader: Reader,
    workdir: pathlib.Path,
    ids: set[str],
    progress: Progress,
) -> tuple[list[Needle], int]:
    """Removes the pictures of rows from all that lies below the working folder.

    From then on the prepared data are good for showing results, and for nothing else.

    Args:
        config: of the data set.
        reader: of the data set.
        workdir: of the run.
        ids: of the rows.
        progress: called with (what, done, total).

    Returns:
        What to search for, and the number of pictures too even to be searched for.
    """
    at = prepare.folders(workdir)
    numbers = np.flatnonzero(np.isin(np.load(at.data / "id.npy"), sorted(ids)))
    numbers = numbers[np.load(at.data / "has_image.npy")[numbers]]
    needles, told = _of_squares(at.data, numbers)
    originals, digests = [], set()
    for example in _originals(config, reader, workdir, ids, progress):
        digests.add(_digest(example.image))
        # Tables and profiles, which many pictures share, stand in the first half.
        for piece in pieces(example.image, len(example.image) // 2):
            told.add(example.id)
            originals.append(Needle(example.id, piece))
    # Said first: what is half emptied must not be trained on.
    (at.data / prepare.PURGED).write_text(
        json.dumps({"pictures": len(numbers)}) + "\n", "utf-8"
    )
    _blank(at.data / "image.npy", numbers)
    needles, originals = (
        _own(those, at.data / "image.npy", progress) for those in (needles, originals)
    )
    for folder in (at.records, at.unpacked, at.new, at.old):
        shutil.rmtree(folder, ignore_errors=True)
    for path in _files([workdir / "sample"]):
        if _digest(path.read_bytes()) in digests:
            path.unlink()
    return needles + originals, len(numbers) - len(told)


def search(
    needles: list[Needle], folders: Iterable[pathlib.Path], progress: Progress
) -> Found:
    """Looks for pieces of pictures in all files of some folders.

    Links are not followed.
    """
    files = list(_files(folders))
    total = sum(path.lstat().st_size for path in files)
    hits = {(n.id, str(path)) for n, path in _occurrences(needles, files, progress)}
    return Found(len(files), total, len(needles), tuple(sorted(hits)))


def _occurrences(
    needles: list[Needle], files: list[pathlib.Path], progress: Progress
) -> Iterator[tuple[Needle, pathlib.Path]]:
    by_key: dict[int, list[Needle]] = {}
    for needle in needles:
        key = int.from_bytes(needle.piece[:8], "little")
        by_key.setdefault(key, []).append(needle)
    keys = np.array(sorted(by_key), np.uint64)
    starts = np.zeros(1 << 16, bool)
    starts[(keys & np.uint64(0xFFFF)).astype(np.int64)] = True
    size, total = 0, sum(path.lstat().st_size for path in files)
    for path in files:
        for chunk in _chunks(path):
            for place in _candidates(chunk, starts, keys):
                key = int.from_bytes(chunk[place : place + 8], "little")
                for needle in by_key[key]:
                    if chunk[place : place + PIECE] == needle.piece:
                        yield needle, path
            size += max(len(chunk) - PIECE + 1, 0)
            progress("searching for their bytes", min(size, total), total)


def _own(needles: list[Needle], path: pathlib.Path, progress) -> list[Needle]:
    """The needles less those that a kept picture has, too, for it is like a part.

    Where a kept picture has all of them it is the same picture: they stay, and are
    found.
    """
    pieces_of: dict[str, set[bytes]] = {}
    for needle in needles:
        pieces_of.setdefault(needle.id, set()).add(needle.piece)
    shared: dict[str, set[bytes]] = {}
    for needle, _ in _occurrences(needles, [path], progress):
        shared.setdefault(needle.id, set()).add(needle.piece)
    return [
        needle
        for needle in needles
        if needle.piece not in shared.get(needle.id, ())
        or shared[needle.id] == pieces_of[needle.id]
    ]


def _candidates(chunk: bytes, starts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where in a chunk the first eight bytes of a needle stand."""
    if len(chunk) < PIECE or not len(keys):
        return np.empty(0, np.int64)
    data = np.frombuffer(chunk, np.uint8)
    two = data[:-1].astype(np.uint16) | (data[1:].astype(np.uint16) << 8)
    places = np.flatnonzero(starts[two])
    places = places[places <= len(data) - PIECE]
    eight = np.lib.stride_tricks.sliding_window_view(data, 8)[places]
    values = np.ascontiguousarray(eight).view("<u8").ravel()
    found = np.searchsorted(keys, values).clip(max=len(keys) - 1)
    return places[keys[found] == values]


def _chunks(path: pathlib.Path) -> Iterator[bytes]:
    """A file in pieces that overlap, so that no needle lies across a cut unseen."""
    with path.open("rb") as file:
        rest = b""
        while data := file.read(_CHUNK):
            yield rest + data
            rest = (rest + data)[-(PIECE - 1) :]


def _files(folders: Iterable[pathlib.Path]) -> Iterator[pathlib.Path]:
    for folder in folders:
        for above, _, names in os.walk(folder):
            for name in sorted(names):
                path = pathlib.Path(above, name)
                if path.is_file() and not path.is_symlink():
                    yield path


def _of_squares(folder: pathlib.Path, numbers: np.ndarray):
    """Needles of stored squares, and the ids of the rows that have any."""
    ids, pictures = np.load(folder / "id.npy"), Rows(folder / "image.npy")
    needles = [
        Needle(str(ids[number]), piece)
        for number in numbers
        for piece in pieces(pictures.slice(number, number + 1).tobytes())
    ]
    pictures.close()
    return needles, {needle.id for needle in needles}


def _blank(path: pathlib.Path, numbers: np.ndarray) -> None:
    stored = np.load(path, mmap_mode="r+")
    stored[numbers] = 0
    stored.flush()


def _originals(
    config: Data, reader: Reader, workdir: pathlib.Path, ids: set[str], progress
) -> Iterator[Example]:
    """The rows with their pictures as they came, from wherever they still are."""
    source = prepare.reopened(config, reader, workdir, progress)
    if source is None:
        return
    total = len(source.keys)
    for done in range(total):
        progress("reading the pictures to purge", done, total)
        try:
            example = source.read(source.keys[done])
        except (Unusable, records.Damaged):
            continue
        if example.id in ids and example.image is not None:
            yield example


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
