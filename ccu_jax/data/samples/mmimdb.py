"""The sample edition of MM-IMDb: invented movies in the official layout."""

import json
import pathlib

import numpy as np

from ccu_jax.data.readers.base import Progress
from ccu_jax.data.samples import movies, topics

_SPLITS = {"train": 0.6, "dev": 0.1, "test": 0.3}


def write(root: pathlib.Path, rows: int, seed: int, progress: Progress) -> None:
    """Writes the layout of the official archive's folder `mmimdb/`."""
    (root / "dataset").mkdir()
    rng = np.random.default_rng([seed, 0])
    ids = [f"{number:07d}" for number in rng.choice(4_000_000, rows, False) + 5]
    tops = topics.topics()
    for number, name in enumerate(ids):
        progress("writing the sample edition", number, rows)
        rng = np.random.default_rng([seed, 1, number])
        movies.write_movie(rng, tops, root / "dataset" / name)
    ends = np.cumsum([round(share * rows) for share in _SPLITS.values()])
    parts = np.split(np.array(ids), ends[:-1])
    splits = {name: part.tolist() for name, part in zip(_SPLITS, parts, strict=True)}
    (root / "split.json").write_text(json.dumps(splits, indent=4), "ascii")
