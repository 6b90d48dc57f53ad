"""Removes images from everything a run stores, and searches for remaining copies.

A run may store an image as decoded pixels (`data/`), as the original file (`records/`,
`unpacked/`, the sample edition), and in leftovers of killed runs. After these are
emptied, all files are searched for byte patterns of both forms. The patterns are stored
as hashes before anything is removed, so a killed purge can be repeated, and later
purges search for them again. Compressed files (checkpoints) are searched as they are;
no images are written to them. The user's own files are not changed.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ccu_jax.data.preparation.prepare import (
    PURGED_FILE,
    Preparation,
    data_paths,
    remove_tree,
)
from ccu_jax.data.preparation.tfds_builders import DamagedRecordsError
from ccu_jax.data.readers.base import Example, Progress, SkipExample
from ccu_jax.errors import UserError
from ccu_jax.storage.columns import ColumnReader
from ccu_jax.storage.files import write_atomically

PATTERN_BYTES = 32  # long enough not to occur by chance
PATTERNS_FILE = "purge-needles.json"
_MIN_DISTINCT_BYTES = 12  # in a pattern: even areas occur in many images
_KEY_BYTES = 8  # of a pattern, looked up before its hash is compared
_CHUNK = 8 << 20  # bytes read at a time


class Pattern(NamedTuple):
    """The hash of a 32-byte piece of an image."""

    id: str  # of the row
    form: str  # "square" (decoded pixels) or "original" (the encoded file)
    key: int  # the first eight bytes of the piece
    hash: str


class PurgeResult(NamedTuple):
    """Counts of removed images, and the result of the search for copies."""

    num_images: int
    num_uniform: int  # images that are too uniform to have a pattern
    num_patterns: int
    num_files: int  # searched
    num_bytes: int  # searched
    hits: list[tuple[str, str]]  # (id of the row, path of the file)


def make_pattern(id_: str, form: str, piece: bytes) -> Pattern:
    """Hashes a piece of PATTERN_BYTES bytes into a pattern."""
    key = int.from_bytes(piece[:_KEY_BYTES], "little")
    return Pattern(id_, form, key, _hash(piece))


def select_pieces(data: bytes, start: int = 0, count: int = 3) -> list[bytes]:
    """Selects up to `count` distinctive pieces, spread over the bytes from `start` on.

    A piece has PATTERN_BYTES bytes. A uniform image yields no piece.
    """
    pieces = []
    for place in range(1, count + 1):
        first = start + (len(data) - start) * place // (count + 1)
        last = min(first + 64 * PATTERN_BYTES, len(data) - PATTERN_BYTES)
        starts = range(first, last, _KEY_BYTES)
        windows = (data[at : at + PATTERN_BYTES] for at in starts)
        varied = [w for w in windows if len(set(w)) >= _MIN_DISTINCT_BYTES]
        # A varied key is preferred: a white one would occur in almost every image.
        varied_key = (w for w in varied if len(set(w[:_KEY_BYTES])) >= _KEY_BYTES // 2)
        if varied:
            pieces.append(next(varied_key, varied[0]))
    return pieces


def purge_images(
    preparation: Preparation,
    ids: set[str],
    folders: Iterable[pathlib.Path],
    remove_derived: Callable[[], None],
) -> PurgeResult:
    """Removes images and searches for copies; see `ccu_jax.data.purge_images`."""
    workdir, progress = preparation.workdir, preparation.progress
    data, patterns_path = preparation.paths.data, workdir / PATTERNS_FILE
    is_purged = np.isin(np.load(data / "id.npy"), sorted(ids))
    rows = np.flatnonzero(is_purged & np.load(data / "has_image.npy"))
    patterns, uniform = _load_patterns(patterns_path)
    searched_before = {pattern.id for pattern in patterns} | uniform
    was_purged = (data / PURGED_FILE).exists()
    original_hashes, stored_ids, blanked_ids = set(), set(), set()
    for id_, pixels in _iterate_stored(data, rows):
        stored_ids.add(id_)
        if was_purged and not any(pixels):
            blanked_ids.add(id_)
        for piece in select_pieces(pixels):
            patterns[make_pattern(id_, "square", piece)] = None
    for example, image in _iterate_originals(preparation, ids):
        original_hashes.add(_hash(image))
        # Many images share the tables and color profiles in the first half.
        for piece in select_pieces(image, len(image) // 2):
            patterns[make_pattern(example.id, "original", piece)] = None
    no_pattern = stored_ids - {pattern.id for pattern in patterns}
    unverifiable = (no_pattern & blanked_ids) - searched_before
    uniform |= no_pattern - unverifiable
    _store_patterns(patterns_path, patterns, uniform)
    # Mark as purged first: after a kill no run may train on partly deleted data.
    for folder in (workdir, data):
        text = json.dumps({"images": len(rows)}) + "\n"
        (folder / PURGED_FILE).write_text(text, "utf-8")
    remove_derived()
    _remove_stored_images(workdir, rows, original_hashes)
    if unverifiable:
        raise UserError(
            f"purge: {len(unverifiable)} images, such as {min(unverifiable)}, were "
            f"removed earlier and have no patterns in {patterns_path}; their removal "
            "cannot be verified; restore that file from a backup and rerun"
        )
    remaining = _drop_shared_patterns(list(patterns), data / "image.npy", progress)
    _store_patterns(patterns_path, remaining, uniform)
    result = search_files(remaining, [*folders, data, workdir / "sample"], progress)
    return PurgeResult(len(rows), len(no_pattern), len(remaining), *result)


def _remove_stored_images(
    workdir: pathlib.Path, rows: np.ndarray, original_hashes: set[str]
) -> None:
    """Zeroes the decoded images of `rows` and removes files with encoded images."""
    paths = data_paths(workdir)
    stored = np.load(paths.data / "image.npy", mmap_mode="r+")
    stored[rows] = 0
    stored.flush()
    for folder in (paths.records, paths.unpacked, paths.new, paths.old):
        remove_tree(folder)
    for path in _find_files([workdir / "sample"]) if original_hashes else ():
        if _hash(path.read_bytes()) in original_hashes:
            path.unlink()


def search_files(
    patterns: list[Pattern], folders: Iterable[pathlib.Path], progress: Progress
) -> tuple[int, int, list[tuple[str, str]]]:
    """Searches all files in `folders` for patterns.

    A symbolic link is followed only if it is one of `folders`. Returns the number of
    files, the number of bytes, and the hits as in `PurgeResult`.
    """
    sizes = _find_files(folders)
    occurrences = _find_occurrences(patterns, sizes, progress)
    hits = {(pattern.id, str(path)) for pattern, path in occurrences}
    return len(sizes), sum(sizes.values()), sorted(hits)


def _find_occurrences(
    patterns: Iterable[Pattern], sizes: dict[pathlib.Path, int], progress: Progress
) -> Iterator[tuple[Pattern, pathlib.Path]]:
    """Yields each occurrence of a pattern, with the file that contains it."""
    by_key: dict[int, list[Pattern]] = {}
    for pattern in patterns:
        by_key.setdefault(pattern.key, []).append(pattern)
    keys = np.array(sorted(by_key), np.uint64)
    # Indexed by the first two bytes: a fast filter before the keys are compared.
    is_prefix = np.zeros(1 << 16, bool)
    is_prefix[(keys & np.uint64(0xFFFF)).astype(np.int64)] = True
    done, total = 0, sum(sizes.values())
    for path in sizes:
        for chunk in _read_overlapping_chunks(path):
            for place in _find_keys(chunk, is_prefix, keys):
                piece = chunk[place : place + PATTERN_BYTES]
                piece_hash = _hash(piece)
                for pattern in by_key[int.from_bytes(piece[:_KEY_BYTES], "little")]:
                    if pattern.hash == piece_hash:
                        yield pattern, path
            done += max(len(chunk) - PATTERN_BYTES + 1, 0)
            progress("searching for remains of images", min(done, total), total)


def _drop_shared_patterns(
    patterns: list[Pattern], path: pathlib.Path, progress: Progress
) -> list[Pattern]:
    """Drops patterns that also occur in retained images, and so identify no image.

    If all patterns of an image in one form occur in retained images, one of those is
    probably a copy. The patterns then stay, so that the search reports it.
    """
    sizes = {path: path.stat().st_size}
    shared = {pattern for pattern, _ in _find_occurrences(patterns, sizes, progress)}
    distinctive = {(p.id, p.form) for p in patterns if p not in shared}
    return [p for p in patterns if p not in shared or (p.id, p.form) not in distinctive]


def _find_keys(chunk: bytes, is_prefix: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Returns the byte offsets in a chunk at which any of the keys begins."""
    if len(chunk) < PATTERN_BYTES or not len(keys):
        return np.empty(0, np.int64)
    data = np.frombuffer(chunk, np.uint8)
    prefixes = data[:-1].astype(np.uint16) | (data[1:].astype(np.uint16) << 8)
    places = np.flatnonzero(is_prefix[prefixes])
    places = places[places <= len(data) - PATTERN_BYTES]
    windows = np.lib.stride_tricks.sliding_window_view(data, _KEY_BYTES)[places]
    values = np.ascontiguousarray(windows).view("<u8").ravel()
    index = np.searchsorted(keys, values).clip(max=len(keys) - 1)
    return places[keys[index] == values]


def _read_overlapping_chunks(path: pathlib.Path) -> Iterator[bytes]:
    """Yields overlapping chunks of a file, so that no pattern is cut."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        overlap = b""
        while data := file.read(_CHUNK):
            yield overlap + data
            overlap = (overlap + data)[-(PATTERN_BYTES - 1) :]


def _find_files(folders: Iterable[pathlib.Path]) -> dict[pathlib.Path, int]:
    """Returns `{path: size in bytes}` of all regular files below `folders`."""
    sizes = {}
    for folder in folders:
        for parent, _, names in os.walk(folder.resolve()):
            for path in (pathlib.Path(parent, name) for name in sorted(names)):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if stat.S_ISREG((status := path.lstat()).st_mode):
                        sizes[path] = status.st_size
    return sizes


def _load_patterns(path: pathlib.Path) -> tuple[dict[Pattern, None], set[str]]:
    """Loads the patterns of earlier purges, and the ids of uniform images."""
    try:
        record = json.loads(path.read_text("utf-8"))
        patterns = {Pattern(*fields): None for fields in record["needles"]}
        return patterns, set(record["even"])
    except FileNotFoundError:
        return {}, set()
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path}: file is damaged, so the removal of images that were purged "
            "earlier cannot be verified; remove the file to continue without it"
        ) from None


def _store_patterns(
    path: pathlib.Path, patterns: Iterable[Pattern], uniform: set[str]
) -> None:
    record = {"needles": list(patterns), "even": sorted(uniform)}
    write_atomically(path, json.dumps(record).encode())


def _iterate_stored(
    folder: pathlib.Path, rows: np.ndarray
) -> Iterator[tuple[str, bytes]]:
    """Yields (id, pixels of the stored image) for each row in `rows`."""
    ids = np.load(folder / "id.npy")
    with contextlib.closing(ColumnReader(folder / "image.npy")) as images:
        for row in rows:
            yield str(ids[row]), images.slice(row, row + 1).tobytes()


def _iterate_originals(
    preparation: Preparation, ids: set[str]
) -> Iterator[tuple[Example, bytes]]:
    """Yields (example, encoded image) for each of `ids` that the source contains."""
    if (source := preparation.reopen_source()) is None:
        return
    for done, key in enumerate(source.keys):
        preparation.progress("reading the images to purge", done, len(source.keys))
        try:
            example = source.read(key)
        except SkipExample:
            continue
        except DamagedRecordsError:
            return
        if example.id in ids and example.image is not None:
            yield example, example.image


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
