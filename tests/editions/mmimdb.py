"""Plants defects in the sample edition of MM-IMDb."""

import json
import os
import pathlib
from collections import Counter

import numpy as np

from ccu_jax.data.readers.untrusted_files import MAX_TEXT_BYTES
from tests.editions.images import damage_images

_PLOT = "A keeper of the lighthouse counts the ships of a long and foggy winter."
# Changed fields of the .json file; None removes one.
_FIELDS = (
    (["skipped: no plot"], {"plot": None}),
    ([], {"plot": [7, _PLOT]}),
    (["noted: plot ends in ::author"], {"plot": [f"{_PLOT}::Ann <ann@example.org>"]}),
    (["noted: NUL characters in a text"], {"plot": [f"Winter.\0{_PLOT}"]}),
    (
        ["noted: broken characters in a text", "noted: non-ASCII text"],
        {"plot": [f"Winter. \ud83d {_PLOT}"]},
    ),
    (["skipped: none of the 23 genres"], {"genres": ["News"]}),
    (["ignored: genre Talk-Show"], {"genres": ["Drama", "Talk-Show"]}),
    (["ignored: unknown genre"], {"genres": ["Drama", "Puppetry", "Puppetry", 7]}),
)
# The content of the .json file.
_CONTENT = (
    ("skipped: text file is no valid JSON", b"[" * 200_000),
    ("skipped: text file is not UTF-8", b'{"genres": ["Drama"], "plot": ["Caf\xe9"]}'),
)
_WRONG_IDS = ("../../elsewhere", 17)


def plant(root: pathlib.Path, seed: int) -> Counter[str]:
    """Plants defects and returns by how much they change the counts."""
    splits = json.loads((root / "split.json").read_text("ascii"))
    ids = [id_ for split in splits.values() for id_ in split]
    order = np.random.default_rng([seed, 9]).permutation(ids)
    movies = iter([root / "dataset" / id_ for id_ in order])
    counts = damage_images(movie.with_suffix(".jpeg") for movie in movies)
    for keys, fields in _FIELDS:
        file = next(movies).with_suffix(".json")
        movie = json.loads(file.read_text("ascii")) | fields
        movie = {name: value for name, value in movie.items() if value is not None}
        file.write_text(json.dumps(movie), "ascii")
        counts.update(keys)
    for key, content in _CONTENT:
        next(movies).with_suffix(".json").write_bytes(content)
        counts[key] += 1
    next(movies).with_suffix(".json").unlink()
    counts["skipped: text file missing"] += 1
    # A sparse file takes no space.
    os.truncate(next(movies).with_suffix(".json"), MAX_TEXT_BYTES + 1)
    counts["skipped: text file too large"] += 1
    splits["test"] += [*_WRONG_IDS, splits["train"][0]]
    counts["skipped: id is not 7 digits"] += len(_WRONG_IDS)
    counts["skipped: id listed twice"] += 1
    (root / "dataset" / "4300000.json").write_text("{}")
    counts["ignored: .json file that split.json does not list"] += 1
    (root / "split.json").write_text(json.dumps(splits), "ascii")
    return counts
