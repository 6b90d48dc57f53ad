"""TFDS records: the encoded images and texts of a data set, readable by tf.data.

They are stored beside the arrays that training reads, as one TFDS data set per shard;
`load_builder` combines the shards. If the arrays are missing or damaged, or other sizes
are requested, they are rebuilt from the records. TensorFlow is imported only inside
functions.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ccu_jax.data.readers.base import SPLITS, Example, Source
from ccu_jax.errors import UserError
from ccu_jax.storage.files import write_atomically

VERSION = "2.0.0"
_MANIFEST = "complete.json"


class DamagedRecordsError(Exception):
    """Raised if the records cannot be read and must be written again."""


class Manifest(NamedTuple):
    """The contents of a complete folder of records."""

    sizes: list[int]  # rows of each shard
    counts: dict[str, int]  # `Counts.numbers` after the rows were read
    name: str  # of the data set, for TFDS


class RecordStore:
    """Writes and reads the records of one data set in a separate folder."""

    def __init__(self, folder: pathlib.Path, name: str, classes: Sequence[str]):  # noqa: D107
        _, self._tfds = import_tensorflow()
        self._folder, self._name, self._classes = folder, name, tuple(classes)

    def write_shard(self, shard: int, examples: list[Example]) -> None:
        """Writes the records of a shard; replaces those that a killed run left."""
        folder = _shard_folder(self._folder, shard)
        shutil.rmtree(folder, ignore_errors=True)
        if not examples:
            return
        splits = [name for name in SPLITS if any(e.split == name for e in examples)]
        # Generators, so that a builder cached by TFDS does not retain the images.
        records = {name: _iterate_records(examples, name) for name in splits}
        config = self._tfds.download.DownloadConfig(try_download_gcs=False)
        with _private_temporary_folder():
            builder = _make_builder_class(self._tfds)(
                name=self._name,
                version=VERSION,
                features=_make_features(self._tfds, self._classes),
                split_datasets=records,
                data_dir=folder,
                file_format="tfrecord",
                disable_shuffling=True,
            )
            builder.download_and_prepare(download_config=config)
        shutil.rmtree(folder / "downloads", ignore_errors=True)

    def has_shards(self, sizes: Sequence[int]) -> bool:
        """Returns whether the files of all non-empty shards exist."""
        folders = _builder_folders(self._folder, self._name, sizes)
        return all(folder.is_dir() for folder in folders)

    def mark_complete(self, sizes: list[int], counts: dict[str, int]) -> None:
        """Writes the manifest, which marks the records as complete."""
        manifest = Manifest(sizes, counts, self._name)
        content = json.dumps(manifest._asdict()).encode()
        write_atomically(self._folder / _MANIFEST, content)

    def open_source(self, sizes: list[int], multi_label: bool, metric: str) -> Source:
        """Returns a source that reads the records; `sizes` are the rows per shard."""
        ends, lock = np.cumsum(sizes), threading.Lock()
        read_shard = functools.lru_cache(maxsize=2)(self._read_shard)

        def read(row: int) -> Example:
            shard = int(np.searchsorted(ends, row, side="right"))
            with lock:
                return read_shard(shard)[row - int(ends[shard])]  # from the shard's end

        return Source(self._classes, multi_label, metric, range(int(ends[-1])), read)

    def _read_shard(self, shard: int) -> list[Example]:
        try:
            folder = _shard_folder(self._folder, shard) / self._name / VERSION
            builder = self._tfds.builder_from_directory(folder)
            splits = builder.as_dataset(
                shuffle_files=False,
                decoders={"image": self._tfds.decode.SkipDecoding()},
                read_config=self._tfds.ReadConfig(
                    interleave_cycle_length=1, try_autocache=False
                ),
            )
            items = [item for x in splits.values() for item in x.as_numpy_iterator()]
            items.sort(key=lambda item: item["row"])
            return [_to_example(item, self._classes) for item in items]
        except MemoryError:
            raise
        except Exception as error:  # TensorFlow and TFDS raise exceptions of any type
            raise DamagedRecordsError(str(error)) from error


def read_manifest(folder: pathlib.Path) -> Manifest | None:
    """Returns the manifest of a folder of records, or None if they are incomplete."""
    try:
        return Manifest(**json.loads((folder / _MANIFEST).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remove_other_records(parent: pathlib.Path, keep: pathlib.Path) -> None:
    """Removes the record folders below `parent` except `keep`."""
    for folder in parent.glob("*"):
        is_store = (folder / _MANIFEST).exists() or any(folder.glob("part-*"))
        if folder != keep and folder.is_dir() and is_store:
            shutil.rmtree(folder)


def load_builder(folder: pathlib.Path) -> Any:
    """Returns the TFDS builder of all records, ready for `as_dataset(split=...)`.

    Images that TensorFlow cannot decode (TIFF, animated GIF) are stored as they are:
    read them with `tfds.decode.SkipDecoding`. Raises UserError if there are no complete
    records, or TensorFlow is not installed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder}: no complete TFDS records; prepare the data with "
            "--set data.records=True"
        )
    _, tfds = import_tensorflow()
    folders = _builder_folders(folder, manifest.name, manifest.sizes)
    return tfds.builder_from_directories([str(folder) for folder in folders])


def import_tensorflow() -> tuple[Any, Any]:
    """Imports TensorFlow and TFDS, with logging off and the GPUs hidden.

    Raises UserError if they are not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"data.records: TensorFlow and TFDS are not installed ({error}); run pip "
            "install tensorflow-cpu tensorflow-datasets, or pass "
            "--set data.records=False"
        ) from error
    with contextlib.suppress(RuntimeError):  # TensorFlow is already initialized
        tf.config.set_visible_devices([], "GPU")
    tfds.disable_progress_bar()
    return tf, tfds


def _shard_folder(folder: pathlib.Path, shard: int) -> pathlib.Path:
    return folder / f"part-{shard:05d}"


def _builder_folders(
    folder: pathlib.Path, name: str, sizes: Sequence[int]
) -> list[pathlib.Path]:
    """Returns the TFDS builder folder of each shard that has rows."""
    shards = [shard for shard, size in enumerate(sizes) if size]
    return [_shard_folder(folder, shard) / name / VERSION for shard in shards]


def _make_builder_class(tfds: Any) -> Any:
    """Returns a TFDS builder class that prints nothing."""

    class Builder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
        def _log_download_bytes(self):
            """Prints nothing: TFDS would report a download that does not happen."""

        _log_download_done = _log_download_bytes

    return Builder


def _make_features(tfds: Any, classes: tuple[str, ...]) -> Any:
    feature = tfds.features
    return feature.FeaturesDict(
        {
            "row": feature.Scalar(np.int64),  # its index in the shard
            "id": feature.Text(),
            "group": feature.Text(),
            "image": feature.Image(encoding_format="jpeg"),
            "has_image": feature.Scalar(np.bool_),
            "text": feature.Text(),
            "has_text": feature.Scalar(np.bool_),
            "labels": feature.Sequence(feature.ClassLabel(names=list(classes))),
            "split": feature.Text(),
        }
    )


def _iterate_records(
    examples: Sequence[Example], split: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row in the shard, record) for each example of a split."""
    for row, example in enumerate(examples):
        if example.split != split:
            continue
        # A record needs an image: a row without an image gets a black pixel.
        image = _encode_black_pixel() if example.image is None else example.image
        record = {
            "row": row,
            "id": example.id,
            "group": example.group,
            "image": io.BytesIO(image),
            "has_image": example.image is not None,
            "text": example.text or "",
            "has_text": example.text is not None,
            "labels": list(example.labels),
            "split": split,
        }
        yield row, record


def _encode_black_pixel() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    return file.getvalue()


def _to_example(item: dict[str, Any], classes: tuple[str, ...]) -> Example:
    return Example(
        id=item["id"].decode(),
        group=item["group"].decode(),
        image=item["image"] if item["has_image"] else None,
        text=item["text"].decode() if item["has_text"] else None,
        labels=tuple(classes[label] for label in item["labels"]),
        split=item["split"].decode(),
    )


@contextlib.contextmanager
def _private_temporary_folder() -> Iterator[None]:
    """Redirects temporary files to a folder that is removed at the end of the block."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before
