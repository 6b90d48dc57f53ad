"""TFDS records: every example is checked and stored once, then read by tf.data.

The only file that imports TensorFlow, and only inside functions.
"""

import io
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ccu_jax.data import pipeline
from ccu_jax.data.source import SPLITS, Counts, Example, Progress, Source
from ccu_jax.errors import UserError

VERSION = "1.0.0"
_CHUNK = 32  # examples whose pictures are checked side by side


def store(
    source: Source,
    path: pathlib.Path,
    size: int,
    counts: Counts,
    progress: Progress,
    *,
    name: str,
    root: pathlib.Path,
    folder: pathlib.Path,
) -> list[Example]:
    """Stores the pictures as squares, by way of TFDS records in `folder`.

    Records that are already there are reused; they depend on the source and not on
    `size`.

    Args:
        source: The opened data set.
        path: The .npy file to write: uint8 [N, size, size, 3].
        size: Side of the squares in pixels.
        counts: Told of every row that is left out.
        progress: Called with (what, done, total).
        name: What TFDS calls the data set.
        root: Where the user has put its files.
        folder: `folder.parent` is ours alone: records of other sources in it go.

    Returns:
        The N used rows in order, with `image` cut down to b"" (or None).
    """
    tf, tfds = import_tensorflow()
    builder = _builder(tfds, name, folder, source, counts, progress)
    if (folder / name / VERSION).exists() and builder.is_prepared():
        try:
            return _read(tf, tfds, builder, path, size, counts, progress)
        except (tf.errors.OpError, ValueError, KeyError, AssertionError):
            progress("stored records are damaged: making them anew", 0, 1)
    shutil.rmtree(folder.parent, ignore_errors=True)  # also what a kill left behind
    builder = _builder(tfds, name, folder, source, counts, progress)
    _allow_open_files(2048)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            manual_dir=root, try_download_gcs=False
        )
    )
    return _read(tf, tfds, builder, path, size, counts, progress)


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
            f"preparing this data set needs TensorFlow and TFDS ({error}): "
            "pip install tensorflow-cpu tensorflow-datasets, or prepare it on another "
            "machine and copy that run's data/ folder into the workdir"
        ) from error
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        pass  # somebody has started TensorFlow already
    tfds.disable_progress_bar()
    return tf, tfds


def _builder(tfds, name, folder, source, counts, progress):
    """A TFDS builder (manual download) over the examples of a source."""
    builder_name = name

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)
        MANUAL_DOWNLOAD_INSTRUCTIONS = "Unpack the data set; name its folder."
        name = builder_name

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=_schema(tfds, source.classes),
                disable_shuffling=True,
                metadata=tfds.core.MetadataDict(),
            )

        def _split_generators(self, dl_manager):
            report = _Report(progress, source.rows)
            splits = {}
            for split in SPLITS:
                checked = _checked(source.examples(split), counts, report)
                # TFDS cannot store a split without any example.
                if (first := next(checked, None)) is not None:
                    checked = itertools.chain([first], checked)
                    splits[split] = self._generate_examples(checked)
            if not splits:
                raise counts.nothing_left()
            return splits

        def _generate_examples(self, examples):
            # TFDS sorts by the key in 1000 buckets that part the 128-bit numbers
            # evenly. Spread keys keep the order and use more than the first bucket.
            spread = 2**128 // max(source.rows, 1)
            for index, example in enumerate(examples):
                yield index * spread, _features(example)
            self.info.metadata["counts"] = dict(counts.numbers)

        def _log_download_bytes(self):
            pass  # TFDS would print that it downloads, which it does not

        def _log_download_done(self):
            pass

    return Builder(data_dir=folder, file_format="tfrecord")


def _schema(tfds, classes: tuple[str, ...]):
    feature = tfds.features
    return feature.FeaturesDict(
        {
            "id": feature.Text(),
            "group": feature.Text(),
            "image": feature.Image(encoding_format="jpeg"),
            "has_image": feature.Scalar(np.bool_),
            "text": feature.Text(),
            "has_text": feature.Scalar(np.bool_),
            "labels": feature.Sequence(feature.ClassLabel(names=list(classes))),
        }
    )


class _Report:
    """Counts the examples of all splits for the progress line."""

    def __init__(self, progress: Progress, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def add(self, number: int) -> None:
        self.done += number
        self.progress("checking and storing pictures", self.done, self.total)


def _checked(
    examples: Iterable[Example], counts: Counts, report: _Report
) -> Iterator[Example]:
    """The examples whose pictures TensorFlow decodes; it would fail later otherwise."""
    examples = iter(examples)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(itertools.islice(examples, _CHUNK)):
            reasons = list(pool.map(_reason_against, chunk))
            for example, reason in zip(chunk, reasons, strict=True):
                if reason:
                    counts.skip(reason, example.id)
                else:
                    yield example
            report.add(len(chunk))


def _reason_against(example: Example) -> str | None:
    import tensorflow as tf

    if example.image is None:
        return None
    try:
        pipeline.picture_size(example.image)
        tf.io.decode_image(example.image, channels=3, expand_animations=False)
    except pipeline.Unusable as reason:
        return str(reason)
    except (tf.errors.OpError, ValueError):
        return "picture damaged"
    return None


def _features(example: Example) -> dict[str, Any]:
    return {
        "id": example.id,
        "group": example.group,
        # A record needs some picture; a black dot stands for none.
        "image": io.BytesIO(example.image or _dot()),
        "has_image": example.image is not None,
        "text": example.text or "",
        "has_text": example.text is not None,
        "labels": list(example.labels),
    }


def _dot() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    return file.getvalue()


def _read(tf, tfds, builder, path, size, counts, progress) -> list[Example]:
    """Decodes all records into the array; gives the rows without their bytes."""
    counts.numbers = dict(builder.info.metadata["counts"])
    splits = builder.info.splits
    total = sum(info.num_examples for info in splits.values())
    names = builder.info.features["labels"].feature.names
    used = []
    with pipeline.Squares(path, size) as squares:
        for split in (split for split in SPLITS if split in splits):
            for item in _dataset(tf, tfds, builder, split, size):
                progress("decoding pictures", len(used), total)
                squares.add(item["image"] if item["has_image"] else None)
                used.append(
                    Example(
                        id=item["id"].decode(),
                        group=item["group"].decode(),
                        image=b"" if item["has_image"] else None,
                        text=item["text"].decode() if item["has_text"] else None,
                        labels=tuple(names[label] for label in item["labels"]),
                        split=split,
                    )
                )
    progress("decoding pictures", total, total)
    return used


def _dataset(tf, tfds, builder, split: str, size: int) -> Iterator[dict[str, Any]]:
    """A tf.data pipeline over one split: decode, fit, pad, in the stored order."""
    dataset = builder.as_dataset(
        split=split,
        shuffle_files=False,
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    dataset = dataset.map(
        lambda item: item | {"image": _square(tf, item["image"], size)},
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    return dataset.prefetch(_CHUNK).as_numpy_iterator()


def _square(tf, data, size: int):
    """`pipeline.square` in TensorFlow: uint8 [size, size, 3]."""
    image = tf.io.decode_image(data, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    longer = tf.maximum(height, width)
    new = [
        tf.maximum(1, (2 * side * size + longer) // (2 * longer))
        for side in (height, width)
    ]
    image = tf.image.resize(image, new, method="bicubic", antialias=True)
    image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    # It pads with zeros, so the negative is padded: that makes the border white.
    negative = tf.image.pad_to_bounding_box(255 - image, top, left, size, size)
    return tf.ensure_shape(255 - negative, [size, size, 3])


def _allow_open_files(number: int) -> None:
    """TFDS keeps 1000 files open for a large split; the usual limit is 1024."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        number = min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
