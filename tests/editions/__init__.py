"""Sample editions with the defects of the real files, and with hostile ones."""

import pathlib
from collections import Counter

from ccu_jax.data.samples import editions
from tests.editions import fashion200k, hatefulmemes, mmimdb, pairs

# Each function plants defects in a written edition; it returns by how much they change
# the counts that its reader reports.
PLANT = {
    "mmimdb": mmimdb.plant,
    "fashion200k": fashion200k.plant,
    "hatefulmemes": hatefulmemes.plant,
    "medical": pairs.plant,
    "satellite": pairs.plant,
}


def write_with_defects(
    name: str, root: pathlib.Path, rows: int, seed: int
) -> Counter[str]:
    """Writes a sample edition and plants all defects in it."""
    editions.write_if_missing(name, root, rows, seed, lambda stage, done, total: None)
    return PLANT[name](root, seed)
