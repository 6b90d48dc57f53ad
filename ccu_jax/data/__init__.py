"""Data sets of pictures and texts: prepared once, then only memory-mapped."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from ccu_jax.config.schema import Data
from ccu_jax.data.dataset import Dataset
from ccu_jax.data.preparation import prepare, purge
from ccu_jax.data.readers import fashion200k, hatefulmemes, mmimdb, pairs
from ccu_jax.data.readers.base import Progress
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError

# A data set is one file with a READER, one row here, and one file in configs/.
DATASETS = {
    "pairs": pairs.READER,
    "mmimdb": mmimdb.READER,
    "fashion200k": fashion200k.READER,
    "hatefulmemes": hatefulmemes.READER,
}


GROUPS = ("own", "text", "image")


def load(
    config: Data,
    workdir: pathlib.Path,
    progress: Progress,
    expected: str | None = None,
) -> Dataset:
    """Loads a data set, preparing it below the working folder when that is needed.

    Prepared files that fit the configuration are memory-mapped; that takes no time and
    no TensorFlow. Files made with other settings, or from files that have changed
    since, are made anew. A kill at any moment leaves nothing half-done.

    Args:
        config: Which data set, from where, and the sizes to store.
        workdir: The run's folder; `workdir/data` is written.
        progress: Called now and then with (what is done, done, total).
        expected: Fingerprint that they must have, if other results go with them.

    Raises:
        UserError: unknown name, missing or malformed files, nothing usable, or other
            data than expected; what was stored before is left as it is.
    """
    _check(config)
    reader = DATASETS[config.dataset]
    stored = prepare.stored(
        config, reader, pathlib.Path(workdir), progress, expected, _write_sample
    )
    return Dataset(name=config.dataset, **stored)


def load_prepared(config: Data, workdir: pathlib.Path) -> Dataset:
    """Maps what process 0 has just loaded; the source need not be seen from here.

    Raises:
        UserError: it is not there.
    """
    return Dataset(name=config.dataset, **prepare.mapped(config, workdir))


def forget(
    config: Data,
    workdir: pathlib.Path,
    ids: set[str],
    folders: Iterable[pathlib.Path],
    progress: Progress,
    also: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Removes pictures from all that a run keeps, and searches for their bytes.

    Args:
        config: of the prepared data set.
        workdir: the run's folder.
        ids: of the rows whose pictures go.
        folders: all that is to be searched.
        progress: called with (what is done, done, total).
        also: removes what knows the pictures elsewhere; called when it is written down
            that they go, so that a purge that was killed is known as one.

    Returns:
        `pictures`, `even` (pictures without a piece to search for), `needles`, `files`
        and `bytes` searched, `hits` as (id, file).
    """
    reader = DATASETS[config.dataset]
    return purge.forget(
        config, reader, workdir, ids, folders, progress, also, _write_sample
    )


def _write_sample(config: Data, workdir: pathlib.Path, progress: Progress) -> None:
    """Writes the sample edition that stands in for files the user does not have."""
    name = config.sample if config.dataset == "pairs" else config.dataset
    root = workdir / "sample" / name
    editions.ensure(name, root, config.sample_rows, config.sample_seed, progress)


def _check(config: Data) -> None:
    if config.dataset not in DATASETS:
        raise UserError(
            f"data.dataset: {config.dataset!r} is none of {', '.join(sorted(DATASETS))}"
        )
    if config.group not in GROUPS:
        raise UserError(f"data.group: {config.group!r} is none of {', '.join(GROUPS)}")
    least = {"image_size": 4, "text_length": 2, "vocabulary": 100}
    for name, number in least.items():
        if getattr(config, name) < number:
            raise UserError(f"data.{name}: {getattr(config, name)} is below {number}")
    test, validation = config.test_fraction, config.validation_fraction
    if not (0 <= test < 1 and 0 <= validation < 1 and test + validation < 1):
        raise UserError(
            f"data.test_fraction {test} and data.validation_fraction {validation} must "
            "be shares of all "
            "rows that leave some for training"
        )
