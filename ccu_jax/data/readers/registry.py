"""All data sets and their readers.

To add a data set: a module with a READER in this package, an entry here, and a file in
`configs/`.
"""

from ccu_jax.data.readers import fashion200k, hatefulmemes, mmimdb, pairs
from ccu_jax.data.readers.base import Reader

DATASETS: dict[str, Reader] = {
    "pairs": pairs.READER,
    "mmimdb": mmimdb.READER,
    "fashion200k": fashion200k.READER,
    "hatefulmemes": hatefulmemes.READER,
}
