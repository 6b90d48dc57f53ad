"""Keeps the prepared form of a data set in `workdir/data`, whole or not at all."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ccu_jax.config.schema import Data
from ccu_jax.data.preparation import arrays
from ccu_jax.data.preparation import ingest as parts
from ccu_jax.data.preparation import tfds_builders as records
from ccu_jax.data.readers import archives as archive
from ccu_jax.data.readers.base import Counts, Location, Progress, Reader, Source, digest
from ccu_jax.errors import UserError, user_error_for
from ccu_jax.storage.records import add_checksum, read_record

FORMAT = 3  # raised whenever the stored form changes
# Settings that say nothing of what a record of TFDS holds.
_SIZES = ("image_size", "crop_margins", "text_length", "vocabulary", "group", "records")
_META = "meta.json"
_PLAN = "plan.json"  # what a folder was begun for
WriteSample = Callable[[Data, pathlib.Path, Progress], None]
PURGED = "purged.json"  # says which pictures were taken out of the stored form


class _Folders(NamedTuple):
    """What the run owns of the data: all below its working folder."""

    data: pathlib.Path
    new: pathlib.Path  # what is being prepared; a later run goes on with it
    old: pathlib.Path  # what it takes the place of
    unpacked: pathlib.Path  # content of archives, while they are needed
    records: pathlib.Path


def folders(workdir: pathlib.Path) -> _Folders:
    """Where things lie below a working folder."""
    names = ("data", "data.new", "data.old", "unpacked", "records")
    return _Folders(*(pathlib.Path(workdir) / name for name in names))


def stored(
    config: Data,
    reader: Reader,
    workdir: pathlib.Path,
    progress: Progress,
    expected: str | None,
    write_sample: WriteSample,
) -> dict[str, Any]:
    """The fields of `Dataset` except its name, prepared first where that is needed.

    Raises:
        UserError: see `ccu_jax.data.load`.
    """
    folder = folders(workdir).data
    found = _current(config, reader, workdir)
    if found and not _untidy(workdir):
        return found
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with _locked(workdir / "data.lock"):
            # Another run may have prepared it while this one waited.
            if not _current(config, reader, workdir):
                _refuse_purged(workdir)
                if folder.exists():
                    progress("they are damaged or of other files: preparing anew", 0, 1)
                new = _Preparation(config, reader, workdir, progress, write_sample)
                new.run(expected)
            _tidy(workdir)
    except OSError as error:
        told = user_error_for(error) or UserError(error)
        raise type(told)(f"preparing the data in {folder} failed: {told}") from error
    found = _current(config, reader, workdir)
    if not found:
        raise UserError(f"data: the files changed while {folder} was prepared")
    return found


def _refuse_purged(workdir: pathlib.Path) -> None:
    """Pictures that were purged do not come back, whatever becomes of the rest."""
    if (workdir / PURGED).exists():
        raise UserError(
            f"pictures were purged from {workdir}, whose prepared data are damaged or "
            "of other settings or files: what is finished stays in its files; give "
            "another --workdir to run anything"
        )


def mapped(config: Data, workdir: pathlib.Path) -> dict[str, Any]:
    """What another process has just prepared, whatever this one sees of the source.

    Raises:
        UserError: it is not there.
    """
    if not (found := _read(config, folders(workdir).data)):
        raise UserError(
            f"data: {workdir} does not hold what process 0 has prepared: give a "
            "--workdir that all processes share"
        )
    return found[1]


def _current(
    config: Data, reader: Reader, workdir: pathlib.Path
) -> dict[str, Any] | None:
    """What is stored, if it was made with these settings from these files."""
    at = folders(workdir)
    if not at.data.exists() and (at.old / _META).exists():
        at.old.rename(at.data)  # a kill between two moves had left it there
    if not (read := _read(config, at.data)):
        return None
    meta, found = read
    try:
        same = _signature_now(config, reader, meta) == meta["signature"]
    except (OSError, UserError):
        return None  # the source is damaged: preparing will tell
    if found["purged"]:  # its pictures are blank, which cannot be checked
        return found
    return found if same and arrays.is_intact(at.data, meta) else None


def _read(config: Data, folder: pathlib.Path) -> tuple[dict, dict] | None:
    """What is said of a prepared folder, and the fields of `Dataset`."""
    try:
        meta = read_record(folder / _META)
        if meta.get("format") != FORMAT or meta["config"] != _settings(config):
            return None
        found = arrays.load(folder)
        if any(len(array) != meta["counts"]["used"] for array in found.values()):
            return None
        names = ("edition", "multi_label", "metric", "vocabulary", "counts")
        found |= {name: meta[name] for name in (*names, "fingerprint")}
        found |= {"classes": tuple(meta["classes"])}
        return meta, found | {"purged": (folder / PURGED).exists()}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
        return None  # damaged


def _untidy(workdir: pathlib.Path) -> list[pathlib.Path]:
    """What a kill has left that nobody needs once the data are in their place."""
    at = folders(workdir)
    files = (at.data / name for name in (*parts.WORK, _PLAN))
    return [path for path in (at.new, at.old, at.unpacked, *files) if path.exists()]


def _tidy(workdir: pathlib.Path) -> None:
    for path in _untidy(workdir):
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink()


def remove_tree(folder: pathlib.Path) -> None:
    """Removes a folder of the run's own; what a link leads to goes with the link."""
    target = folder.resolve()
    if target.exists():
        shutil.rmtree(target)
    if folder.is_symlink():
        folder.unlink()


def _signature_now(config: Data, reader: Reader, meta: dict[str, Any]) -> str:
    """The mark of the raw files; of old if they are gone (made elsewhere, say)."""
    if config.dir is None:
        place = Location(pathlib.Path(meta["root"]), meta["edition"])
        gone = not place.root.exists()
        return meta["signature"] if gone else reader.signature(config, place)
    given = pathlib.Path(config.dir).expanduser()
    if not given.exists():
        return meta["signature"]
    if given.is_file():
        return _archive_mark(given)
    place = reader.locate(config, pathlib.Path())
    return reader.signature(config, place)


def _archive_mark(path: pathlib.Path) -> str:
    status = path.stat()
    return digest("archive", str(status.st_size), str(status.st_mtime_ns))


def _settings(config: Data) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def reopened(
    config: Data,
    reader: Reader,
    workdir: pathlib.Path,
    progress: Progress,
    write_sample: WriteSample,
) -> Source | None:
    """The source of what is prepared, read from where it still is; None: nowhere."""
    at = folders(workdir)
    meta = read_record(at.data / _META)
    try:
        return _Preparation(config, reader, workdir, progress, write_sample).open()[1]
    except (OSError, UserError):
        pass  # the files are gone, or have been damaged since
    for folder in at.records.glob("*"):
        if records.complete(folder) is not None:
            empty = Source(
                tuple(meta["classes"]), meta["multi_label"], meta["metric"], (), str
            )
            keeper = records.Records(
                folder, config.dataset, empty.classes, meta["root"]
            )
            return keeper.reading(empty)
    return None


class _Preparation:
    """Fills a new folder beside `workdir/data` and puts it in its place."""

    def __init__(
        self, config, reader: Reader, workdir, progress: Progress, write_sample
    ):
        self.write_sample = write_sample
        self.config, self.reader, self.workdir = config, reader, workdir
        self.progress, self.at = progress, folders(workdir)
        self.counts = Counts(str(config.dir or config.dataset), config.strict)

    def run(self, expected: str | None) -> None:
        """Prepares everything; goes on with what a killed run has left."""
        at = self.at
        if at.data.exists() and not (at.data / _META).exists():
            raise UserError(
                f"{at.data} is in the way, and not of this program's making: give "
                "another --workdir"
            )
        meta, source = self.open()
        self._collect(source, meta)
        meta |= arrays.finish(at.new, source, self.config, self.counts, self.progress)
        if expected not in (None, meta["fingerprint"]):
            remove_tree(at.new)
            raise UserError(
                f"the data in {meta['root']} have changed since {self.workdir} was "
                "made: give another --workdir, or remove the folder to start anew"
            )
        text = json.dumps(add_checksum(meta), indent=1)
        (at.new / _META).write_text(text, "utf-8")
        if at.data.exists():
            remove_tree(at.old)
            at.data.rename(at.old)
        at.new.rename(at.data)

    def open(self) -> tuple[dict[str, Any], Source]:
        """What is to be stored about the source, and the source."""
        config, signature = self.config, None
        given = pathlib.Path(config.dir).expanduser() if config.dir else None
        if given is not None and given.is_file():
            signature = _archive_mark(given)
            config = dataclasses.replace(config, dir=str(self._unpack(given)))
        place = self.reader.locate(config, self.workdir)
        if config.dir is None and place.edition == "sample":
            self.write_sample(config, self.workdir, self.progress)
        self.counts.origin = str(given or place.root)
        meta = {
            "format": FORMAT,
            "config": _settings(self.config),
            "root": str((given or place.root).absolute()),
            "edition": place.edition,
            "signature": signature or self.reader.signature(config, place),
        }
        return meta, self.reader.open(config, place, self.counts, self._unpack)

    def _unpack(self, path: pathlib.Path) -> pathlib.Path:
        """The content of an archive, unpacked once."""
        if not archive.is_archive(path):
            raise UserError(
                f"data.dir: {path} is neither a folder nor a zip or tar archive"
            )
        name = digest(str(path.absolute()), _archive_mark(path))
        return archive.unpack(path, self.at.unpacked / name, self.counts, self.progress)

    def _claim(self, meta: dict[str, Any], read_from: str) -> None:
        """Leaves what is there alone only if it was begun for the very same pass."""
        plan = json.dumps(meta | {"from": read_from}, indent=1)
        path = self.at.new / _PLAN
        if not path.exists() or path.read_text("utf-8") != plan:
            remove_tree(self.at.new)
            self.at.new.mkdir()
            path.write_text(plan, "utf-8")

    def _collect(self, source: Source, meta: dict[str, Any]) -> None:
        """The pass over all rows: from stored records where they are whole."""
        args = (self.at.new, self.config, self.counts, self.progress)
        if not self.config.records:
            self._claim(meta, "source")
            parts.collect(source, *args, None)
            return
        kept = {k: v for k, v in meta["config"].items() if k not in _SIZES}
        key = digest(meta["signature"], json.dumps(kept, sort_keys=True))
        folder = self.at.records / key
        keeper = records.Records(
            folder, self.config.dataset, source.classes, meta["root"]
        )
        if (told := records.complete(folder)) is not None:
            opened = dict(self.counts.numbers)
            try:
                self._claim(meta, "records")
                parts.collect(keeper.reading(source), *args, None)
                self.counts.numbers = told["counts"]
                return
            except records.Damaged:
                self.progress("stored records are damaged: making them anew", 0, 1)
                remove_tree(folder)
                self.counts.numbers = opened
        records.remove_all(self.at.records, but=folder)
        self._claim(meta, "source")
        if not keeper.has(parts.done(self.at.new)):
            remove_tree(self.at.new)  # somebody has removed the records meanwhile
            self._claim(meta, "source")
        sizes = parts.collect(source, *args, keeper)
        if sum(sizes):
            keeper.finish(sizes, dict(self.counts.numbers))


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
