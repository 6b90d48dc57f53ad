"""Keeps the prepared form of a data set in `workdir/data`, whole or not at all."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from ccu_jax.config import Data
from ccu_jax.data import pipeline, records, text
from ccu_jax.data.source import Counts, Example, Place, Progress, Reader, Source, digest
from ccu_jax.errors import UserError

FORMAT = 1  # raised whenever the stored form changes
_MAPPED = ("image", "text")
_LOADED = ("labels", "has_image", "has_text", "id", "group", "split")
# Settings that change what is stored, but not what a record of TFDS holds.
_SIZES = ("image_size", "text_length", "vocabulary")


def stored(
    config: Data,
    reader: Reader,
    workdir: pathlib.Path,
    progress: Progress,
    expected: str | None,
) -> dict[str, Any]:
    """The fields of `Dataset` except its name, prepared first where that is needed.

    Raises:
        UserError: see `ccu_jax.data.load`.
    """
    folder = workdir / "data"
    if found := _current(config, reader, folder):
        return found
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with _locked(workdir / "data.lock"):
            # Another process may have prepared it while this one waited.
            if found := _current(config, reader, folder):
                return found
            _prepare(config, reader, workdir, progress, expected)
    except OSError as error:
        raise UserError(f"preparing the data in {folder} failed: {error}") from error
    found = _current(config, reader, folder)
    if not found:
        raise UserError(f"data: the files changed while {folder} was prepared")
    return found


def _current(
    config: Data, reader: Reader, folder: pathlib.Path
) -> dict[str, Any] | None:
    """What is stored, if it was made with these settings from these files."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if meta.get("format") != FORMAT or meta["config"] != _settings(config):
        return None
    try:
        place = _place(config, reader, meta)
        if place and reader.signature(config, place) != meta["signature"]:
            return None
        arrays = {name: _map(folder, name) for name in _MAPPED}
        arrays |= {name: np.load(folder / f"{name}.npy") for name in _LOADED}
    except (OSError, ValueError, EOFError, UserError):
        return None  # damaged, or the source is: preparing will tell
    if any(len(array) != meta["counts"]["used"] for array in arrays.values()):
        return None
    told = ("edition", "multi_label", "vocabulary", "counts", "fingerprint")
    arrays |= {name: meta[name] for name in told}
    return arrays | {"classes": tuple(meta["classes"])}


def _place(config: Data, reader: Reader, meta: dict[str, Any]) -> Place | None:
    """Where the raw files are now; None if gone (prepared on another machine, say)."""
    if config.dir is None:  # the reader might write its sample edition
        place = Place(pathlib.Path(meta["root"]), meta["edition"])
        return place if place.root.exists() else None
    if not pathlib.Path(config.dir).expanduser().exists():
        return None
    return reader.locate(config, pathlib.Path(), lambda *told: None)


def _map(folder: pathlib.Path, name: str) -> np.ndarray:
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def _settings(config: Data) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _prepare(
    config: Data,
    reader: Reader,
    workdir: pathlib.Path,
    progress: Progress,
    expected: str | None,
) -> None:
    """Fills a new folder beside `workdir/data` and puts it in its place."""
    folder, scratch, old = (workdir / f"data{end}" for end in ("", ".new", ".old"))
    if folder.exists() and not (folder / "meta.json").exists():
        raise UserError(
            f"{folder} is in the way, and not of this program's making: give another "
            "--workdir"
        )
    for leftover in (scratch, old):  # of a run that was killed or that failed
        shutil.rmtree(leftover, ignore_errors=True)
    place = reader.locate(config, workdir, progress)
    meta = {
        "format": FORMAT,
        "config": _settings(config),
        "root": str(place.root.absolute()),
        "edition": place.edition,
        "signature": reader.signature(config, place),
    }
    counts = Counts(str(place.root), config.strict)
    source = reader.open(config, place, counts)
    scratch.mkdir()
    path = scratch / "image.npy"
    if reader.decoder == "tfds":
        rows = records.store(
            source,
            path,
            config.image_size,
            counts,
            progress,
            name=config.dataset,
            root=place.root,
            folder=workdir / "records" / _record_key(meta),
        )
    else:
        rows = pipeline.store_with_pillow(source, path, config, counts, progress)
    _finish(scratch, rows, source, config, counts, meta, progress)
    if expected not in (None, meta["fingerprint"]):
        shutil.rmtree(scratch)
        raise UserError(
            f"the data in {place.root} have changed since {workdir} was made: give "
            "another --workdir, or remove the folder to start anew"
        )
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _record_key(meta) -> str:
    """A name for the records of these files: sizes are not in them."""
    kept = {k: v for k, v in meta["config"].items() if k not in _SIZES}
    return digest(meta["signature"], json.dumps(kept, sort_keys=True))


def _finish(scratch, rows, source, config, counts, meta, progress) -> None:
    """Writes all but the pictures, completes `meta`, and writes it last."""
    _check(rows, source, counts)
    counts.add("used", len(rows))
    progress("tokenising texts", 0, len(rows))
    meta["vocabulary"] = _write(scratch, rows, source, config)
    progress("tokenising texts", len(rows), len(rows))
    meta["classes"], meta["multi_label"] = source.classes, source.multi_label
    meta["counts"] = counts.numbers
    meta["fingerprint"] = _fingerprint(scratch, source.classes)
    (scratch / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


def _check(rows: list[Example], source: Source, counts: Counts) -> None:
    if not rows:
        raise counts.nothing_left()
    if not any(row.split == "train" for row in rows):
        raise UserError(f"{counts.what}: no usable row in the train split")
    if len(source.classes) < (1 if source.multi_label else 2):
        raise UserError(
            f"{counts.what}: {len(source.classes)} classes in all rows; there must be "
            "at least two to tell apart"
        )


def _write(
    scratch: pathlib.Path, rows: list[Example], source: Source, config: Data
) -> int:
    """Writes everything but the pictures; gives the number of token ids."""
    texts = [row.text for row in rows]
    training = [row.text for row in rows if row.split == "train" and row.text]
    tokenizer = text.train(training, config.vocabulary)
    tokenizer.save(str(scratch / "tokenizer.json"))
    column = {name: k for k, name in enumerate(source.classes)}
    labels = np.zeros((len(rows), len(column)), np.float32)
    for n, row in enumerate(rows):
        labels[n, [column[label] for label in row.labels]] = 1
    arrays = {
        "text": text.encode(tokenizer, texts, config.text_length),
        "labels": labels,
        "has_image": np.array([row.image is not None for row in rows]),
        "has_text": np.array([row.text is not None for row in rows]),
        "id": np.array([row.id for row in rows], np.str_),
        "group": np.array([row.group for row in rows], np.str_),
        "split": np.array([row.split for row in rows], np.str_),
    }
    for name, array in arrays.items():
        np.save(scratch / f"{name}.npy", array)
    return tokenizer.get_vocab_size()


def _fingerprint(scratch: pathlib.Path, classes: tuple[str, ...]) -> str:
    hashed = hashlib.blake2b("\0".join(classes).encode(), digest_size=16)
    for name in (*_MAPPED, *_LOADED):
        with (scratch / f"{name}.npy").open("rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
            os.fsync(file.fileno())
    return hashed.hexdigest()


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a killed process."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there, start one run per folder at a time
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
