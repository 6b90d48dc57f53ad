"""Prepares a data set below a working folder, atomically."""

import dataclasses
import fcntl
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from ccu_jax.config.schema import Data
from ccu_jax.data.preparation import arrays, ingest, tfds_builders
from ccu_jax.data.preparation.tfds_builders import DamagedRecordsError, RecordStore
from ccu_jax.data.readers import archives
from ccu_jax.data.readers.base import Counts, Location, Progress, Reader, Source, digest
from ccu_jax.errors import UserError, user_error_for
from ccu_jax.storage.records import add_checksum, read_record

FORMAT_VERSION = 3  # incremented whenever the stored format changes
PURGED_FILE = "purged.json"  # marks a folder from which images were removed
# Settings that do not change the TFDS records.
_ARRAY_SETTINGS = {"image_size", "crop_margins", "text_length", "vocabulary"}
_ARRAY_SETTINGS |= {"group", "records"}
_META = "meta.json"
_PLAN = "plan.json"  # the metadata of the preparation that a folder belongs to

# Writes the sample edition for a user who has no files.
WriteSample = Callable[[Data, pathlib.Path, Progress], None]


class Paths(NamedTuple):
    """The folders of a run's data."""

    data: pathlib.Path  # the prepared data
    new: pathlib.Path  # being prepared; a later run resumes it
    old: pathlib.Path  # being replaced
    unpacked: pathlib.Path  # content of archives, until the preparation is finished
    records: pathlib.Path


def data_paths(workdir: pathlib.Path) -> Paths:
    """Returns the folders of a run's data below its working folder."""
    names = ("data", "data.new", "data.old", "unpacked", "records")
    return Paths(*(pathlib.Path(workdir) / name for name in names))


def load_prepared(config: Data, workdir: pathlib.Path) -> dict[str, Any]:
    """Memory-maps the data that process 0 prepared; see `data.load_prepared`."""
    stored = _read_stored(config, data_paths(workdir).data)
    if not stored:
        raise UserError(
            f"data: {workdir} lacks the data that process 0 has prepared; pass a "
            "--workdir that all processes share"
        )
    return stored[1]


def remove_tree(folder: pathlib.Path) -> None:
    """Removes a folder; if it is a link, removes the link and its target."""
    target = folder.resolve()
    if target.exists():
        shutil.rmtree(target)
    if folder.is_symlink():
        folder.unlink()


@dataclasses.dataclass
class Preparation:
    """Prepares one data set below a working folder."""

    config: Data
    reader: Reader
    workdir: pathlib.Path
    progress: Progress
    write_sample: WriteSample

    def __post_init__(self) -> None:  # noqa: D105
        self.paths, config = data_paths(self.workdir), self.config
        self._counts = Counts(str(config.dir or config.dataset), config.strict)

    def load_or_prepare(self, expected: str | None) -> dict[str, Any]:
        """Returns the fields of `Dataset` except its name; see `ccu_jax.data.load`."""
        stored = self._load_current()
        if stored and not self._find_leftovers():
            return stored
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            with (self.workdir / "data.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system at a kill
                # Another run may have prepared the data while this one waited.
                if not self._load_current():
                    self._prepare(expected)
                for path in self._find_leftovers():
                    remove_tree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            cause = user_error_for(error) or UserError(error)
            raise type(cause)(
                f"preparing the data in {self.paths.data} failed: {cause}"
            ) from error
        if stored := self._load_current():
            return stored
        raise UserError(
            f"data: the source changed while {self.paths.data} was prepared; rerun "
            "the same command"
        )

    def reopen_source(self) -> Source | None:
        """Returns the source of the prepared data, or None if it no longer exists.

        Falls back to the TFDS records if the original files are missing or damaged.
        """
        meta = read_record(self.paths.data / _META)
        try:
            return self._open_source()[1]
        except (OSError, UserError):
            pass
        for folder in self.paths.records.glob("*"):
            if (manifest := tfds_builders.read_manifest(folder)) is not None:
                store = RecordStore(folder, self.config.dataset, meta["classes"])
                multi_label, metric = meta["multi_label"], meta["metric"]
                return store.open_source(manifest.sizes, multi_label, metric)
        return None

    def _load_current(self) -> dict[str, Any] | None:
        """Loads the stored data if they match the settings and the source."""
        data, old = self.paths.data, self.paths.old
        if not data.exists() and (old / _META).exists():
            old.rename(data)  # a run was killed between two renames
        if not (stored := _read_stored(self.config, data)):
            return None
        meta, fields = stored
        try:
            is_same = self._compute_signature(meta) == meta["signature"]
        except (OSError, UserError):
            return None  # the preparation reports what is wrong with the source
        if fields["purged"]:  # its blanked images do not match their checksum
            return fields
        return fields if is_same and arrays.is_intact(data, meta) else None

    def _compute_signature(self, meta: dict[str, Any]) -> str:
        """Returns the signature of the source, or the stored one if there is none."""
        root = pathlib.Path(self.config.dir or meta["root"]).expanduser()
        if not root.exists():
            return meta["signature"]
        if root.is_file():
            return _compute_archive_signature(root)
        location = Location(root, meta["edition"])
        if self.config.dir is not None:
            location = self.reader.locate(self.config, self.workdir)
        return self.reader.compute_signature(self.config, location)

    def _find_leftovers(self) -> list[pathlib.Path]:
        """Returns the temporary files and folders that exist but are not needed."""
        paths = self.paths
        files = (paths.data / name for name in (*ingest.WORK_FILES, _PLAN))
        candidates = (paths.new, paths.old, paths.unpacked, *files)
        return [path for path in candidates if path.exists()]

    def _prepare(self, expected: str | None) -> None:
        """Prepares the data in a new folder and renames it; resumes a killed run."""
        paths = self.paths
        if (self.workdir / PURGED_FILE).exists():
            raise UserError(
                f"images were purged from {self.workdir}, and the prepared data are "
                "damaged or do not match the settings or source files; its results "
                "remain, but new runs need another --workdir"
            )
        if paths.data.exists():
            self.progress("data are damaged or outdated: preparing again", 0, 1)
            if not (paths.data / _META).exists():
                raise UserError(
                    f"{paths.data}: folder was not created by this program; pass "
                    "another --workdir"
                )
        meta, source = self._open_source()
        self._ingest(source, meta)
        meta |= arrays.write_columns(
            paths.new, source, self.config, self._counts, self.progress
        )
        if expected not in (None, meta["fingerprint"]):
            remove_tree(paths.new)
            raise UserError(
                f"the data in {meta['root']} have changed since {self.workdir} was "
                "created; pass another --workdir, or remove the folder to start over"
            )
        text = json.dumps(add_checksum(meta), indent=1)
        (paths.new / _META).write_text(text, "utf-8")
        if paths.data.exists():
            remove_tree(paths.old)
            paths.data.rename(paths.old)
        paths.new.rename(paths.data)

    def _open_source(self) -> tuple[dict[str, Any], Source]:
        """Opens the source; returns the metadata known so far, and the source."""
        config, signature = self.config, None
        path = pathlib.Path(config.dir).expanduser() if config.dir else None
        if path is not None and path.is_file():
            signature = _compute_archive_signature(path)
            config = dataclasses.replace(config, dir=str(self._unpack(path)))
        location = self.reader.locate(config, self.workdir)
        if config.dir is None and location.edition == "sample":
            self.write_sample(config, self.workdir, self.progress)
        root = path or location.root
        self._counts.origin = str(root)
        meta = {
            "format": FORMAT_VERSION,
            "config": _to_json(self.config),
            "root": str(root.absolute()),
            "edition": location.edition,
            "signature": signature or self.reader.compute_signature(config, location),
        }
        source = self.reader.open(config, location, self._counts, self._unpack)
        return meta, source

    def _unpack(self, path: pathlib.Path) -> pathlib.Path:
        """Returns the folder of an archive; unpacks it unless that was done before."""
        name = digest(str(path.absolute()), _compute_archive_signature(path))
        folder = self.paths.unpacked / name
        return archives.unpack(path, folder, self._counts, self.progress)

    def _ingest(self, source: Source, meta: dict[str, Any]) -> None:
        """Ingests all rows, from the TFDS records if they exist and are intact."""
        args = (self.paths.new, self.config, self._counts, self.progress)
        if not self.config.records:
            self._start_or_resume(meta, "source")
            ingest.ingest_rows(source, *args, None)
            return
        settings = {k: v for k, v in meta["config"].items() if k not in _ARRAY_SETTINGS}
        key = digest(meta["signature"], json.dumps(settings, sort_keys=True))
        folder = self.paths.records / key
        store = RecordStore(folder, self.config.dataset, source.classes)
        if (manifest := tfds_builders.read_manifest(folder)) is not None:
            counts_of_source = dict(self._counts.numbers)
            try:
                self._start_or_resume(meta, "records")
                properties = source.multi_label, source.metric
                stored = store.open_source(manifest.sizes, *properties)
                ingest.ingest_rows(stored, *args, None)
                self._counts.numbers = manifest.counts
                return
            except DamagedRecordsError:
                self.progress("TFDS records are damaged: writing them again", 0, 1)
                remove_tree(folder)
                self._counts.numbers = counts_of_source
        tfds_builders.remove_other_records(self.paths.records, keep=folder)
        self._start_or_resume(meta, "source")
        sizes = ingest.ingest_rows(source, *args, store)
        if sum(sizes):
            store.mark_complete(sizes, self._counts.numbers)

    def _start_or_resume(self, meta: dict[str, Any], origin: str) -> None:
        """Empties the new folder unless it belongs to the same preparation."""
        plan = json.dumps(meta | {"from": origin}, indent=1)
        path = self.paths.new / _PLAN
        if not path.exists() or path.read_text("utf-8") != plan:
            remove_tree(self.paths.new)
            self.paths.new.mkdir()
            path.write_text(plan, "utf-8")


def _read_stored(
    config: Data, folder: pathlib.Path
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns a folder's metadata and `Dataset` fields, or None if they are invalid."""
    try:
        meta = read_record(folder / _META)
        if meta.get("format") != FORMAT_VERSION or meta["config"] != _to_json(config):
            return None
        fields: dict[str, Any] = dict(arrays.load_columns(folder))
        if any(len(column) != meta["counts"]["used"] for column in fields.values()):
            return None
        names = ("edition", "multi_label", "metric", "vocabulary", "counts")
        fields |= {name: meta[name] for name in (*names, "fingerprint")}
        fields |= {"classes": tuple(meta["classes"])}
        return meta, fields | {"purged": (folder / PURGED_FILE).exists()}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
        return None  # damaged


def _compute_archive_signature(path: pathlib.Path) -> str:
    status = path.stat()
    return digest("archive", str(status.st_size), str(status.st_mtime_ns))


def _to_json(config: Data) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))
