"""Hateful Memes (Kiela et al., 2020) in its official layouts: memes, hateful or not.

    data/img/<5 digits>.png        the pictures, or img.tar.gz (img.zip) that holds them
    data/train.jsonl               one row a line: "id", "img", "label", "text"
    data/dev.jsonl  test.jsonl     first phase of the contest
    data/dev_seen.jsonl  dev_unseen.jsonl  test_seen.jsonl  test_unseen.jsonl   second

Get it from https://hatefulmemeschallenge.com/ , where its licence is accepted; nothing
is ever downloaded here. The content of the official files is offensive: no row of them
belongs in messages, documents or tests.
"""

import hashlib
import os
import pathlib

from ccu_jax.config.schema import Data
from ccu_jax.data.readers import hatefulmemes_splits as lists
from ccu_jax.data.readers.base import (
    MARKER,
    Counts,
    Example,
    Location,
    Reader,
    Source,
    Unpack,
    digest,
)
from ccu_jax.data.readers.untrusted_files import Folder, reject_external_links
from ccu_jax.errors import UserError

PAGE = "https://hatefulmemeschallenge.com/"
CLASSES = ("not-hateful", "hateful")

_ARCHIVES = ("img.tar.gz", "img.zip")
_REMEDY = f"get it from {PAGE} (if the download is gone, ask Meta for access)"


def locate(config: Data, workdir: pathlib.Path) -> Location:
    """Returns the user's folder, or the sample edition below the working folder.

    A folder that the user names is never replaced by the sample edition.

    Raises:
        UserError: nothing there that could be read; what is missing.
    """
    if config.dir is None:
        return Location(workdir / "sample" / "hatefulmemes" / "data", "sample")
    given = pathlib.Path(os.path.abspath(os.path.expanduser(config.dir)))
    try:
        root = _root(given)
        places = {root / name: root for name in (*lists.FILES, "img", *_ARCHIVES)}
        above = given.parent
        reject_external_links(places | {root: above if root == above else given})
        marked = _marker(root) is not None
    except OSError as error:
        raise UserError(f"data.dir: {given} cannot be read: {error}") from None
    return Location(root, "sample" if marked else "official")


def signature(config: Data, place: Location) -> str:
    """Hash of the lists and of when the folder (or archive) of pictures changed."""
    parts: list[str | bytes] = []
    for path in (place.root / name for name in lists.FILES):
        if path.is_file():
            with path.open("rb") as file:
                parts += [path.name, hashlib.file_digest(file, "blake2b").digest()]
    marker = _marker(place.root)
    if place.edition == "sample" and config.dir is None and marker:
        return digest(*parts, marker.read_bytes())
    pictures = place.root / (_pictures(place.root) or "img")
    status = pictures.stat()
    size = "" if pictures.is_dir() else str(status.st_size)
    return digest(*parts, pictures.name, size, str(status.st_mtime_ns))


def open_hatefulmemes(
    config: Data, place: Location, counts: Counts, unpack: Unpack
) -> Source:
    """Reads the lists.

    The dev files become the validation split and the test files that have labels the
    test split. Where none has, as during the contest, the dev files are the test split,
    and a part of the training rows is kept for validation.

    Raises:
        UserError: lists without any row to train on, or to test.
    """
    rows = lists.rows(place.root, config.validation_fraction, counts)
    folder = Folder(_picture_folder(place.root, counts, unpack))

    def read(row: lists.Row) -> Example:
        picture = folder.read(row.image, "image")
        labels = (CLASSES[row.label],)
        return Example(row.id, row.id, picture, row.text, labels, row.split, row.notes)

    return Source(CLASSES, False, "auroc", rows, read, lambda row: row.id)


# --- where the files are --------------------------------------------------------------


def _root(given: pathlib.Path) -> pathlib.Path:
    """The folder with train.jsonl: the given one, one below, or one above."""
    if not given.is_dir():
        raise UserError(
            f"data.dir: there is no folder {given} with Hateful Memes; {_REMEDY}"
        )
    candidates = [given, given / "data"]
    candidates += [given.parent] if given.name == "img" else []
    found = [root for root in candidates if _is_root(root)][:1]
    if not found and not any((root / lists.TRAIN).is_file() for root in candidates):
        # What is not printable would garble the messages that name the folder.
        below = sorted(
            p for p in given.iterdir() if p.is_dir() and p.name.isprintable()
        )
        deeper = [root for path in below for root in (path, path / "data")]
        found = [root for root in deeper if _is_root(root)]
        candidates += deeper
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"data.dir: {given} holds Hateful Memes more than once: name one of "
            f"{found[0]} and {found[1]}"
        )
    for root in candidates:
        if (root / lists.TRAIN).is_file():
            raise UserError(
                f"data.dir: {root} holds {lists.TRAIN}, but neither img/ nor "
                f"{' nor '.join(_ARCHIVES)}: unpack all of the official zip, or "
                f"{_REMEDY}"
            )
    raise UserError(
        f"data.dir: neither {given} nor {given / 'data'} holds {lists.TRAIN} of "
        f"Hateful Memes: unpack the official zip there, or {_REMEDY}"
    )


def _is_root(root: pathlib.Path) -> bool:
    return (root / lists.TRAIN).is_file() and _pictures(root) is not None


def _pictures(root: pathlib.Path) -> str | None:
    """The name of what holds the pictures; an empty folder is the last choice."""
    folder = root / "img"
    if folder.is_dir():
        with os.scandir(folder) as files:
            if next(files, None) is not None:
                return folder.name
    for name in _ARCHIVES:
        if (root / name).is_file():
            return name
    return folder.name if folder.is_dir() else None


def _marker(root: pathlib.Path) -> pathlib.Path | None:
    """What tells a sample edition from the real one."""
    places = [root, root.parent] if root.name == "data" else [root]
    return next((at / MARKER for at in places if (at / MARKER).is_file()), None)


def _picture_folder(root: pathlib.Path, counts: Counts, unpack: Unpack) -> pathlib.Path:
    name = _pictures(root) or "img"
    if name == "img":
        return root / name
    counts.add(f"noted: images in {name}")
    unpacked = unpack(root / name)
    return unpacked / "img" if (unpacked / "img").is_dir() else unpacked


READER = Reader(locate, signature, open_hatefulmemes)
