"""Data sets of images and texts: prepared once, then memory-mapped."""

import pathlib
from collections.abc import Callable, Iterable

from ccu_jax.config.schema import Data
from ccu_jax.data.dataset import Dataset
from ccu_jax.data.preparation import prepare, purge
from ccu_jax.data.readers.base import Progress
from ccu_jax.data.readers.registry import DATASETS
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError

__all__ = ["DATASETS", "Dataset", "load", "load_prepared", "purge_images"]


def load(
    config: Data,
    workdir: pathlib.Path,
    progress: Progress,
    expected: str | None = None,
) -> Dataset:
    """Loads a data set, after preparing it in the working folder if necessary.

    Prepared files that match the configuration and the source are memory-mapped without
    importing TensorFlow; otherwise the data are prepared again. A killed preparation is
    resumed and leaves no partial data set.

    Args:
        config: the data set, its source, and the sizes to store.
        workdir: the run's folder; the data are written to `workdir/data`.
        progress: called with (stage, done, total).
        expected: the data fingerprint in the stored results, or None if there are none.

    Raises:
        UserError: invalid settings, missing or malformed files, no usable row, or a
            fingerprint that differs from `expected`. Stored data are left unchanged.
    """
    fields = _build_preparation(config, workdir, progress).load_or_prepare(expected)
    return Dataset(name=config.dataset, **fields)


def load_prepared(config: Data, workdir: pathlib.Path) -> Dataset:
    """Memory-maps the data that process 0 has prepared; needs no source files.

    Raises UserError if there are no prepared data with these settings.
    """
    return Dataset(name=config.dataset, **prepare.load_prepared(config, workdir))


def purge_images(
    config: Data,
    workdir: pathlib.Path,
    ids: set[str],
    folders: Iterable[pathlib.Path],
    progress: Progress,
    remove_derived: Callable[[], None] = lambda: None,
) -> purge.PurgeResult:
    """Removes images from everything a run stores and searches for remaining copies.

    Args:
        config: settings of the prepared data set.
        workdir: the run's folder.
        ids: ids of the rows whose images are removed.
        folders: the folders to search.
        progress: called with (stage, done, total).
        remove_derived: removes models and features made from the images. It is called
            after the data are marked as purged, so a killed purge is recognized.

    Raises:
        UserError: an earlier removal of images cannot be verified.
    """
    preparation = _build_preparation(config, workdir, progress)
    return purge.purge_images(preparation, ids, folders, remove_derived)


def _build_preparation(
    config: Data, workdir: pathlib.Path, progress: Progress
) -> prepare.Preparation:
    _check_config(config)
    reader = DATASETS[config.dataset]
    return prepare.Preparation(config, reader, workdir, progress, _write_sample)


def _write_sample(config: Data, workdir: pathlib.Path, progress: Progress) -> None:
    """Writes the sample edition of the configured data set to `workdir/sample`."""
    name = config.sample if config.dataset == "pairs" else config.dataset
    root = workdir / "sample" / name
    editions.write_if_missing(
        name, root, config.sample_rows, config.sample_seed, progress
    )


def _check_config(config: Data) -> None:
    if config.dataset not in DATASETS:
        raise UserError(
            f"data.dataset: unknown data set {config.dataset!r}; choose one of "
            f"{', '.join(sorted(DATASETS))}"
        )
    if config.test_fraction + config.validation_fraction >= 1:
        raise UserError(
            f"data.test_fraction={config.test_fraction} and "
            f"data.validation_fraction={config.validation_fraction}: no rows are left "
            "for training; their sum must be below 1"
        )
