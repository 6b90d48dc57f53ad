"""What must hold of a data set, an archive and a picture, whatever is in them."""

import os
import pathlib
import re
import stat

import numpy as np

from ccu_jax.config.schema import Data
from ccu_jax.data import DATASETS, Dataset
from ccu_jax.data.preparation import arrays, prepare
from ccu_jax.data.preparation import images as pictures
from ccu_jax.data.preparation import ingest as parts
from ccu_jax.data.readers import archives as archive
from ccu_jax.data.readers.base import (
    SPLITS,
    Counts,
    Example,
    SkipExample,
    Source,
    digest,
)
from ccu_jax.errors import UserError
from ccu_jax.unlearn_sets import splits as unlearn_set
from tests.fuzz.contents import SECRET
from tests.fuzz.data_sets import Case
from tests.fuzz.world import Failure, World, watched

_LONGEST = 1500  # characters of a message
_FORBIDDEN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_UNFIT = re.compile("[\0\ud800-\udfff]")  # for a text, which may have lines
_SIZES = {"image_size": 8, "text_length": 4, "vocabulary": 100}


def _clear_message(error: UserError) -> str:
    message = str(error)
    if SECRET in message:
        raise Failure(f"an error tells the secret: {message!r}")
    if (
        not message
        or len(message) > _LONGEST
        or _FORBIDDEN.search(
            re.sub(
                "[\udc80-\udcff]", "", message
            )  # bytes of a name, escaped when printed
        )
    ):
        raise Failure(f"is no clear message: {message[:3000]!r}")
    return message


def _told(names) -> None:
    """What is counted goes into reports: nothing in it may come from the files."""
    for name in names:
        if (
            SECRET in name
            or len(name) > 90
            or not (name.isascii() and name.isprintable())
        ):
            raise Failure(f"a count is called {name!r}")


def _checked(example: Example, source: Source) -> None:
    """Refuses an example that something later would stumble over."""
    words = (example.id, example.group, *example.labels)
    for word in words:
        if not word or word != word.strip() or _FORBIDDEN.search(word):
            raise Failure(f"a name that does not survive a file: {word!r}")
        if str(np.array([word])[0]) != word or SECRET in word:
            raise Failure(f"a name that does not survive an array: {word!r}")
    if f"{example.id} ".startswith("# "):
        raise Failure(f"an id that a list of ids takes for a comment: {example.id!r}")
    if example.text is not None and (
        not example.text.strip() or _UNFIT.search(example.text)
    ):
        raise Failure(f"a text that does not survive a file: {example.text!r}")
    if SECRET in (example.text or "") or SECRET.encode() in (example.image or b""):
        raise Failure("the secret is out")
    if example.image is None and example.text is None:
        raise Failure("a row with nothing to see or read")
    if example.split not in SPLITS or not set(example.labels) <= set(source.classes):
        raise Failure(f"split or label unknown: {example.split!r} {example.labels!r}")
    if len(set(example.labels)) != (len(example.labels) if source.multi_label else 1):
        raise Failure(f"not one label: {example.labels!r}")
    _told(example.notes)


def _quiet(*told) -> None:
    pass


def read(here: World, case: Case, *, strict: bool = False, whole: bool = False):
    """Reads a data set; gives what happened, raises Failure.

    Args:
        here: where it is planted.
        case: the data set.
        strict: whether a row that cannot be used is an error.
        whole: whether it is also stored.
    """
    here.plant(case.tree)
    config = Data(
        dataset=case.dataset,
        dir=str(here.root),
        **{"strict": strict, **_SIZES, **case.settings},
    )
    try:
        with watched(here):
            counts = _read(here, config)
            if whole:
                counts |= {"stored": 1, **_store(here, config)}
    except UserError as error:
        message = _clear_message(error).replace(str(here.root), "ROOT")
        return {"error: " + message.replace(str(here.work), "WORK"): 1}
    _told(counts)
    return counts


def _opened_source(here: World, config: Data, counts: Counts) -> Source:
    reader = DATASETS[config.dataset]

    def unpack(path: pathlib.Path) -> pathlib.Path:
        folder = here.work / "unpacked" / digest(str(path))
        return archive.unpack(path, folder, counts, _quiet)

    place = reader.locate(config, here.work)
    if reader.signature(config, place) != reader.signature(config, place):
        raise Failure("two marks of the same files")
    return reader.open(config, place, counts, unpack)


def _read(here: World, config: Data) -> dict[str, int]:
    counts = Counts(str(here.root), config.strict)
    source = _opened_source(here, config, counts)
    ids: set[str] = set()
    for key in source.keys:
        try:
            example = source.read(key)
        except SkipExample as reason:
            counts.skip(str(reason), source.row_name(key))
            continue
        _checked(example, source)
        if example.id in ids:
            raise Failure(f"an id twice: {example.id!r}")
        ids.add(example.id)
        for note in example.notes:
            counts.add(note)
    left_out = sum(
        number
        for name, number in counts.numbers.items()
        if name.startswith("skipped: ") and "archive member" not in name
    )
    if counts.numbers.get("read", 0) != len(ids) + left_out:
        raise Failure(f"{len(ids)} rows are used, {counts.numbers}")
    return counts.numbers | {"used": len(ids)} if ids else counts.numbers


def _store(here: World, config: Data) -> dict[str, int]:
    """Everything up to what training reads, and the lists that are made of it."""
    scratch = prepare.data_paths(here.work).new
    scratch.mkdir()
    counts = Counts(str(here.root), config.strict)
    source = _opened_source(here, config, counts)
    parts.ingest_rows(source, scratch, config, counts, _quiet, None)
    meta = arrays.write_columns(scratch, source, config, counts, _quiet)
    columns = arrays.load_columns(scratch)
    data = Dataset(
        name=config.dataset,
        edition="own",
        **columns,
        **{key: meta[key] for key in Dataset._fields if key in meta},
    )
    if len(set(data.id.tolist())) != len(data.id):
        raise Failure("an id twice once they are stored")
    train = np.flatnonzero(data.split == "train")
    sets = unlearn_set.Sets(*[train] * 2, *[np.flatnonzero(data.split == "test")] * 3)
    (here.work / "lists").mkdir()
    text = unlearn_set.format_unlearn_set(data, sets, 0, "random:0.1")
    (here.work / "lists" / "0.txt").write_bytes(text.encode("utf-8"))
    unlearn_set.format_near_duplicates(data, sets, {"train": train}).encode("utf-8")
    found = unlearn_set.load_all_ids(data, here.work / "lists", "report")
    if found != set(data.id[train].tolist()):
        raise Failure(f"a list of ids loses some: {found} {data.id[train].tolist()}")
    return counts.numbers


def unpack(here: World, data: bytes, strict: bool = False) -> dict[str, int]:
    """Unpacks an archive; gives what happened, raises Failure."""
    path, folder = here.root / "a", here.work / "below" / "new"
    path.write_bytes(data)
    counts = Counts("here", strict)
    try:
        with watched(here):
            archive.unpack(path, folder, counts, _quiet)
    except UserError as error:
        if os.listdir(folder.parent) if folder.parent.exists() else ():
            raise Failure(f"left {os.listdir(folder.parent)}") from None
        message = _clear_message(error).replace(str(here.root), "ROOT")
        return {"error: " + re.sub(r"damaged \(.*\)", "damaged", message): 1}
    _told(counts.numbers)
    if sorted(os.listdir(folder.parent)) != ["new", "new.json"]:
        raise Failure(f"wrote {os.listdir(folder.parent)}")
    count = 0
    for above, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = os.lstat(os.path.join(above, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or mode & 0o7022:
                raise Failure(f"unpacked {name!r} with mode {mode:o}")
        count += len(names)
    if here.root.stat().st_nlink != 2 or os.listdir(here.root) != ["a"]:
        raise Failure(f"wrote {os.listdir(here.root)}")
    return counts.numbers | ({"unpacked a file": count} if count else {"nothing": 1})


def decode(here: World, data: bytes, size: int, trim: bool) -> dict[str, int]:
    """Decodes a picture; gives what happened, raises Failure."""
    with watched(here):
        try:
            square, notes = pictures.decode(data, size, trim)
        except SkipExample as reason:
            _told([str(reason)])
            return {f"skipped: {reason}": 1}
    if square.shape != (size, size, 3) or square.dtype != np.uint8:
        raise Failure(f"a square {square.shape} of {square.dtype}")
    _told(notes)
    return {"decoded": 1, **dict.fromkeys(notes, 1)}
