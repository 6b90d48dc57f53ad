"""TFDS records: pictures and texts as they came, checked, for tf.data to read.

They are kept beside the arrays that training reads, one TFDS data set for each part of
the pass over the source, and together they are one: `builder(folder)` gives it. Where
the arrays are lost or damaged they are made from these. The only file that imports
TensorFlow, and only inside functions.
"""

import contextlib
import io
import json
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ccu_jax.data.readers.base import SPLITS, Example, Source
from ccu_jax.errors import UserError

VERSION = "2.0.0"
_COMPLETE = "complete.json"


class Damaged(Exception):
    """Records that cannot be read; they must be made anew."""


class Records:
    """The records of one data set in a folder of their own.

    Args:
        folder: what it is called says of which source it is.
        name: of the data set, for TFDS.
        classes: K names of labels.
        root: where the source's files are.

    Raises:
        UserError: TensorFlow is not installed.
    """

    def __init__(  # noqa: D107
        self, folder: pathlib.Path, name: str, classes: Sequence[str], root
    ):
        self._tf, self._tfds = import_tensorflow()
        self._folder, self._name, self._root = folder, name, root
        self._classes = tuple(classes)

    def write(self, part: int, examples: list[Example]) -> None:
        """Stores a part, in place of what a kill may have left of it."""
        shutil.rmtree(self._part(part), ignore_errors=True)
        if not examples:
            return
        builder = _builder(self._tfds, self._name, self._classes)(
            examples, data_dir=self._part(part), file_format="tfrecord"
        )
        with _own_temporary_folder():
            builder.download_and_prepare(
                download_config=self._tfds.download.DownloadConfig(
                    manual_dir=self._root, try_download_gcs=False
                )
            )
        builder.release()  # TFDS may keep the builder; it must not keep the pictures
        shutil.rmtree(self._part(part) / "downloads", ignore_errors=True)  # empty

    def has(self, sizes: list[int]) -> bool:
        """Whether the first parts are there, with so many rows each."""
        return all(
            self._place(part).is_dir() for part, size in enumerate(sizes) if size
        )

    def finish(self, sizes: list[int], counts: dict[str, int]) -> None:
        """Says that all parts are there, with so many rows each."""
        told = {"sizes": sizes, "counts": counts, "name": self._name}
        path = self._folder / _COMPLETE
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(told), "utf-8")
        temporary.replace(path)

    def reading(self, source: Source) -> Source:
        """The same source, with its usable rows read from the records."""
        ends = np.cumsum(complete(self._folder)["sizes"])
        kept: dict[int, list[Example]] = {}
        lock = threading.Lock()

        def read(row: int) -> Example:
            part = int(np.searchsorted(ends, row, side="right"))
            with lock:
                if part not in kept:
                    for old in [old for old in kept if old < part - 1]:
                        del kept[old]
                    kept[part] = self._read(part)
                return kept[part][row - int(ends[part])]  # counted from its end

        return source._replace(keys=range(int(ends[-1])), read=read, row_name=str)

    def _part(self, part: int) -> pathlib.Path:
        return self._folder / f"part-{part:05d}"

    def _place(self, part: int) -> pathlib.Path:
        return self._part(part) / self._name / VERSION

    def _read(self, part: int) -> list[Example]:
        try:
            builder = self._tfds.builder_from_directory(self._place(part))
            items = [
                item
                for split in builder.info.splits
                for item in _dataset(self._tfds, builder, split).as_numpy_iterator()
            ]
            items.sort(key=lambda item: item["row"])
            return [_example(item, self._classes) for item in items]
        except MemoryError:
            raise
        except Exception as error:  # TensorFlow's and TFDS' are of any kind
            raise Damaged(str(error)) from error


def complete(folder: pathlib.Path) -> dict[str, Any] | None:
    """What `finish` said of the records in a folder: `sizes`, `counts`, `name`."""
    try:
        told = json.loads((folder / _COMPLETE).read_text("utf-8"))
        return told if {"sizes", "counts", "name"} <= told.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def remove_all(above: pathlib.Path, but: pathlib.Path) -> None:
    """Removes the records of other sources; other things there are left alone."""
    for folder in above.glob("*"):
        ours = (folder / _COMPLETE).exists() or any(folder.glob("part-*"))
        if folder != but and folder.is_dir() and ours:
            shutil.rmtree(folder)


def builder(folder: pathlib.Path) -> Any:
    """The TFDS builder of all records in a folder, ready for `as_dataset(split=...)`.

    The few pictures that Pillow reads and TensorFlow does not (TIFF, animated GIF) are
    in as they came: pass them over with `tfds.decode.SkipDecoding`.

    Raises:
        UserError: there are none, or TensorFlow is not installed.
    """
    told = complete(folder)
    if told is None:
        raise UserError(
            f"{folder} holds no finished records: prepare with data.records=True"
        )
    _, tfds = import_tensorflow()
    return tfds.builder_from_directories(
        [
            str(folder / f"part-{part:05d}" / told["name"] / VERSION)
            for part, size in enumerate(told["sizes"])
            if size
        ]
    )


def import_tensorflow() -> tuple[Any, Any]:
    """TensorFlow and TFDS: quiet, and with their hands off the accelerator.

    Raises:
        UserError: if they are not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"keeping TFDS records needs TensorFlow and TFDS ({error}): "
            "pip install tensorflow-cpu tensorflow-datasets, or do without the "
            "records: --set data.records=False"
        ) from error
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        pass  # somebody has started TensorFlow already
    tfds.disable_progress_bar()
    return tf, tfds


def decoding(paths: Sequence[pathlib.Path], size: int) -> Any:
    """A tf.data pipeline that decodes JPEG files anew each epoch, without preparing.

    It gives batches of 64 squares of `size` pixels a side, uint8; for comparison.
    """
    tf, _ = import_tensorflow()

    def one(path):
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        image = tf.image.resize_with_pad(image, size, size)
        return tf.cast(image, tf.uint8)

    files = tf.data.Dataset.from_tensor_slices([str(path) for path in paths])
    # A fixed number of threads: left to TensorFlow, it begins with few.
    return files.map(one, num_parallel_calls=os.cpu_count() or 1).batch(64).prefetch(1)


def _builder(tfds, builder_name: str, classes: tuple[str, ...]):
    """A TFDS builder (manual download) of the examples of one part."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)
        MANUAL_DOWNLOAD_INSTRUCTIONS = "Unpack the data set; name its folder."
        name = builder_name

        def __init__(self, examples: Sequence[Example], **kwargs):
            self._examples = examples
            super().__init__(**kwargs)

        def release(self):
            self._examples = ()

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=_schema(tfds, classes),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {
                split: self._generate_examples(split)
                for split in SPLITS
                if any(example.split == split for example in self._examples)
            }

        def _generate_examples(self, split):
            for row, example in enumerate(self._examples):
                if example.split == split:
                    yield row, _features(row, example)

        def _log_download_bytes(self):
            pass  # TFDS would print that it downloads, which it does not

        def _log_download_done(self):
            pass

    return Builder


def _schema(tfds, classes: tuple[str, ...]):
    feature = tfds.features
    return feature.FeaturesDict(
        {
            "row": feature.Scalar(np.int64),  # its place in the part
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


def _features(row: int, example: Example) -> dict[str, Any]:
    return {
        "row": row,
        "id": example.id,
        "group": example.group,
        # A record needs some picture; a black dot stands for none.
        "image": io.BytesIO(_dot() if example.image is None else example.image),
        "has_image": example.image is not None,
        "text": example.text or "",
        "has_text": example.text is not None,
        "labels": list(example.labels),
        "split": example.split,
    }


def _dot() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    return file.getvalue()


def _example(item: dict[str, Any], classes: tuple[str, ...]) -> Example:
    return Example(
        id=item["id"].decode(),
        group=item["group"].decode(),
        image=item["image"] if item["has_image"] else None,
        text=item["text"].decode() if item["has_text"] else None,
        labels=tuple(classes[label] for label in item["labels"]),
        split=item["split"].decode(),
    )


def _dataset(tfds, builder, split: str):
    """A tf.data pipeline over the encoded records of a split, in the stored order."""
    return builder.as_dataset(
        split=split,
        shuffle_files=False,
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )


@contextlib.contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """TFDS leaves an empty folder behind for every builder; here it goes."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before
