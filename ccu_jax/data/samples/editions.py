"""The sample editions: small synthetic substitutes for data sets a user lacks.

Their content is invented or clip art. They show that a method runs; a score on one does
not predict the score on the real data set.
"""

import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

from ccu_jax.data.readers.base import MARKER, Progress
from ccu_jax.data.samples import fashion200k, hatefulmemes, medical, mmimdb, satellite
from ccu_jax.errors import UserError


class Writer(NamedTuple):
    """The writer of one data set's sample edition.

    `write(root, rows, seed, progress)` fills the new folder `root`. The same arguments
    give the same bytes.
    """

    version: int  # incremented whenever the written files change
    unit: str  # the plural noun for rows, as in "30 movies"
    min_rows: int
    write: Callable[[pathlib.Path, int, int, Progress], None]


WRITERS = {
    "mmimdb": Writer(1, "movies", 30, mmimdb.write),
    "fashion200k": Writer(2, "images of clothes", 200, fashion200k.write),
    "hatefulmemes": Writer(1, "memes", 150, hatefulmemes.write),
    "medical": Writer(2, "studies", 60, medical.write),
    "satellite": Writer(1, "tiles", 60, satellite.write),
}


def write_if_missing(
    name: str, root: pathlib.Path, rows: int, seed: int, progress: Progress
) -> None:
    """Writes the generated sample edition `name` unless `root` has it already.

    Args:
        name: a key of WRITERS.
        root: the folder that the official archive would be unpacked to.
        rows: number of rows to write.
        seed: a non-negative integer; the same seed gives the same bytes.
        progress: called with (stage, rows done, rows).

    Raises:
        UserError: too few rows, or `root` contains other files.
    """
    writer = WRITERS[name]
    if rows < writer.min_rows:
        raise UserError(
            f"data.sample_rows={rows}: too few {writer.unit}; use at least "
            f"{writer.min_rows} (--rows)"
        )
    marker = (
        f"A synthetic sample in the format of {name}: invented texts and images.\n"
        f"Nothing in it is real. rows {rows}, seed {seed}, writer {writer.version}\n"
    )
    has_marker = (root / MARKER).is_file()
    if has_marker and (root / MARKER).read_text("utf-8") == marker:
        return
    if root.exists() and any(root.iterdir()) and not has_marker:
        raise UserError(
            f"{root}: not empty and not a sample edition; choose another folder"
        )
    # Written to a scratch folder and renamed, so a kill leaves no partial edition.
    scratch = root.with_name(root.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    writer.write(scratch, rows, seed, progress)
    (scratch / MARKER).write_text(marker, "utf-8")
    progress("writing the sample edition", rows, rows)
    shutil.rmtree(root, ignore_errors=True)
    scratch.rename(root)
