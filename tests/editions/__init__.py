"""Sample editions with the defects of the real files, and with hostile ones."""

import pathlib

from ccu_jax.data.samples import editions
from tests.editions import fashion200k, hatefulmemes, mmimdb, pairs
from tests.editions.defects import Defect

_PLANT = {
    "mmimdb": mmimdb.plant,
    "fashion200k": fashion200k.plant,
    "hatefulmemes": hatefulmemes.plant,
    "medical": pairs.plant,
    "satellite": pairs.plant,
}


def write_with_defects(
    name: str, root: pathlib.Path, rows: int, seed: int
) -> list[Defect]:
    """Writes a sample edition, plants every known defect in it, and lists them all.

    The list also holds what a reader counts in the edition without any defect.
    """
    editions.ensure(name, root, rows, seed, lambda stage, done, total: None)
    return _PLANT[name](root, seed)
