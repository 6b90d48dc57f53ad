"""Takes forgotten pictures out of all that a run keeps, and looks for their bytes.

A picture may lie there as a square of pixels (`data/`), as the file it came as
(`records/`, `unpacked/`, a sample edition), or in what a killed run has left. After
these are emptied, every file is searched for pieces of both forms. What to search for
is written down first, as hashes of the pieces: a purge that was killed goes on, and any
later one searches again. Files that are compressed (checkpoints) are searched as they
lie there; no pictures are put into them. The user's own files are not touched.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ccu_jax.config.schema import Data
from ccu_jax.data.preparation import prepare
from ccu_jax.data.preparation import tfds_builders as records
from ccu_jax.data.readers.base import Example, Progress, Reader, SkipExample
from ccu_jax.errors import UserError
from ccu_jax.storage.columns import ColumnReader

PIECE = 32  # bytes that are looked for: chance does not bring so many together
NEEDLES = "purge-needles.json"
_VARIETY = 12  # different bytes that a needle must have: even areas tell nothing
_KEY = 8  # bytes by which a needle is looked for, before its hash is compared
_CHUNK = 8 << 20


class Needle(NamedTuple):
    """A piece of a picture of a row, to be known again by its hash."""

    id: str
    form: str  # "square" or "original"
    key: int  # its first eight bytes
    hash: str


def needle(id_: str, form: str, piece: bytes) -> Needle:
    """What to look for instead of the piece itself."""
    return Needle(id_, form, int.from_bytes(piece[:_KEY], "little"), _hash(piece))


def pieces(data: bytes, first: int = 0, count: int = 3) -> list[bytes]:
    """Telling pieces of bytes, spread over what follows `first`."""
    found = []
    for place in range(1, count + 1):
        start = first + (len(data) - first) * place // (count + 1)
        # The first window from there on that is varied enough, if there is one also in
        # its key: a key that is white, say, would be met in every picture.
        end = min(start + 64 * PIECE, len(data) - PIECE)
        varied = [
            data[at : at + PIECE]
            for at in range(start, end, _KEY)
            if len(set(data[at : at + PIECE])) >= _VARIETY
        ]
        keyed = (one for one in varied if len(set(one[:_KEY])) >= _KEY // 2)
        if varied:
            found.append(next(keyed, varied[0]))
    return found


def forget(
    config: Data,
    reader: Reader,
    workdir: pathlib.Path,
    ids: set[str],
    folders: Iterable[pathlib.Path],
    progress: Progress,
    also: Callable[[], None],
    write_sample: prepare.WriteSample,
) -> dict[str, Any]:
    """Removes pictures, and searches; see `ccu_jax.data.forget`."""
    at, kept = prepare.folders(workdir), workdir / NEEDLES
    all_ids = np.load(at.data / "id.npy")
    numbers = np.flatnonzero(np.isin(all_ids, sorted(ids)))
    numbers = numbers[np.load(at.data / "has_image.npy")[numbers]]
    needles, even = _stored(kept)
    known = {n.id for n in needles} | even
    needles |= dict.fromkeys(_of_squares(at.data, numbers))
    originals = set()
    for example in _originals(config, reader, workdir, ids, progress, write_sample):
        originals.add(_hash(example.image))
        # Tables and profiles, which many pictures share, stand in the first half.
        for piece in pieces(example.image, len(example.image) // 2):
            needles[needle(example.id, "original", piece)] = None
    without = {str(i) for i in all_ids[numbers]} - {n.id for n in needles}
    lost = (without & _blank(at.data, numbers)) - known
    even |= without - lost
    _write(kept, needles, even)
    # Said first: what is half emptied must not be gone on from.
    for folder in (workdir, at.data):
        text = json.dumps({"pictures": len(numbers)}) + "\n"
        (folder / prepare.PURGED).write_text(text, "utf-8")
    also()
    _empty(workdir, numbers, originals)
    if lost:
        raise UserError(
            f"purge: {len(lost)} pictures, {min(lost)} among them, are gone already, "
            f"and {kept} does not say what they were: nothing can be proved of them"
        )
    searched = _own(list(needles), at.data / "image.npy", progress)
    _write(kept, searched, even)
    found = search(searched, [*folders, at.data, workdir / "sample"], progress)
    return {"pictures": len(numbers), "even": len(without), **found}


def _empty(workdir: pathlib.Path, numbers: np.ndarray, originals: set[str]) -> None:
    """Takes the pictures of rows out of all that the run owns.

    `originals` are hashes of the files that they came as.
    """
    at = prepare.folders(workdir)
    stored = np.load(at.data / "image.npy", mmap_mode="r+")
    stored[numbers] = 0
    stored.flush()
    for folder in (at.records, at.unpacked, at.new, at.old):
        prepare.remove_tree(folder)
    for path in _files([workdir / "sample"]) if originals else ():
        if _hash(path.read_bytes()) in originals:
            path.unlink()


def search(
    needles: list[Needle], folders: Iterable[pathlib.Path], progress: Progress
) -> dict[str, Any]:
    """Looks for pieces of pictures in all files of some folders.

    Links are not followed, but for the folders themselves.

    Returns:
        `needles` looked for, `files` and `bytes` searched, `hits` as (id, file).
    """
    files = list(dict.fromkeys(_files(folders)))
    total = sum(map(_size, files))
    hits = {(n.id, str(path)) for n, path in _occurrences(needles, files, progress)}
    return {
        "needles": len(needles),
        "files": len(files),
        "bytes": total,
        "hits": sorted(hits),
    }


def _occurrences(
    needles: Iterable[Needle], files: list[pathlib.Path], progress: Progress
) -> Iterator[tuple[Needle, pathlib.Path]]:
    by_key: dict[int, list[Needle]] = {}
    for one in needles:
        by_key.setdefault(one.key, []).append(one)
    keys = np.array(sorted(by_key), np.uint64)
    starts = np.zeros(1 << 16, bool)
    starts[(keys & np.uint64(0xFFFF)).astype(np.int64)] = True
    done, total = 0, sum(map(_size, files))
    for path in files:
        for chunk in _chunks(path):
            for place in _candidates(chunk, starts, keys):
                piece = chunk[place : place + PIECE]
                hashed = _hash(piece)
                for one in by_key[int.from_bytes(piece[:_KEY], "little")]:
                    if one.hash == hashed:
                        yield one, path
            done += max(len(chunk) - PIECE + 1, 0)
            progress("searching for their bytes", min(done, total), total)


def _own(needles: list[Needle], path: pathlib.Path, progress) -> list[Needle]:
    """The needles less those that a kept picture has, too, for it is like a part.

    Where a kept picture has all of one form it is the same picture: they stay, and are
    found.
    """
    shared = {one for one, _ in _occurrences(needles, [path], progress)}
    telling = {(n.id, n.form) for n in needles if n not in shared}
    return [n for n in needles if n not in shared or (n.id, n.form) not in telling]


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
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        rest = b""
        while data := file.read(_CHUNK):
            yield rest + data
            rest = (rest + data)[-(PIECE - 1) :]


def _files(folders: Iterable[pathlib.Path]) -> Iterator[pathlib.Path]:
    for folder in folders:
        for above, _, names in os.walk(folder.resolve()):
            for name in sorted(names):
                path = pathlib.Path(above, name)
                if path.is_file() and not path.is_symlink():
                    yield path


def _size(path: pathlib.Path) -> int:
    """Its bytes; 0 where it has vanished, as files of other runs may."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _stored(path: pathlib.Path) -> tuple[dict[Needle, None], set[str]]:
    """What earlier purges looked for, and the ids of pictures too even for that."""
    try:
        told = json.loads(path.read_text("utf-8"))
        return {Needle(*one): None for one in told["needles"]}, set(told["even"])
    except FileNotFoundError:
        return {}, set()
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path} is damaged: without it nothing can be proved of the pictures that "
            "were purged before; remove it to go on all the same"
        ) from None


def _write(path: pathlib.Path, needles: Iterable[Needle], even: set[str]) -> None:
    temporary = path.with_suffix(".new")
    told = {"needles": list(needles), "even": sorted(even)}
    temporary.write_text(json.dumps(told), "utf-8")
    temporary.replace(path)


def _of_squares(folder: pathlib.Path, numbers: np.ndarray) -> Iterator[Needle]:
    """Needles of stored squares; those that are blank have none."""
    ids = np.load(folder / "id.npy")
    with contextlib.closing(ColumnReader(folder / "image.npy")) as pictures:
        for number in numbers:
            for piece in pieces(pictures.slice(number, number + 1).tobytes()):
                yield needle(str(ids[number]), "square", piece)


def _blank(folder: pathlib.Path, numbers: np.ndarray) -> set[str]:
    """The ids of pictures that were taken out before."""
    ids = np.load(folder / "id.npy")
    if not (folder / prepare.PURGED).exists():
        return set()
    with contextlib.closing(ColumnReader(folder / "image.npy")) as pictures:
        return {
            str(ids[number])
            for number in numbers
            if not pictures.slice(number, number + 1).any()
        }


def _originals(
    config: Data,
    reader: Reader,
    workdir: pathlib.Path,
    ids: set[str],
    progress,
    write_sample: prepare.WriteSample,
) -> Iterator[Example]:
    """The rows with their pictures as they came, from wherever they still are."""
    source = prepare.reopened(config, reader, workdir, progress, write_sample)
    if source is None:
        return
    total = len(source.keys)
    for done in range(total):
        progress("reading the pictures to purge", done, total)
        try:
            example = source.read(source.keys[done])
        except SkipExample:
            continue
        except records.Damaged:
            return
        if example.id in ids and example.image is not None:
            yield example


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
