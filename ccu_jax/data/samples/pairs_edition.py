"""The form of the worked examples: pictures, `pairs.jsonl`, and a split by group."""

import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from ccu_jax.data.readers.base import Progress

_SHARES = {"train": 0.65, "validation": 0.15, "test": 0.2}


def write(
    root: pathlib.Path,
    sizes: list[int],
    seed: int,
    rows_of: Callable[[int, int], Iterator[dict]],
    letter: str,
    progress: Progress,
) -> None:
    """Writes `pairs.jsonl` and the folder `images`.

    Args:
        root: The new folder.
        sizes: Number of rows of each group.
        seed: Of the split.
        rows_of: Gives the rows of a group of so many: "picture" (encoded), "text", and
            "label" or "labels".
        letter: What the names of the groups begin with.
        progress: Called with (what, done, total).
    """
    (root / "images").mkdir()
    done = 0
    with (root / "pairs.jsonl").open("w", encoding="utf-8", newline="\n") as index:
        for group, split in enumerate(_splits(sizes, seed)):
            name = f"{letter}{group:05d}"
            for number, row in enumerate(rows_of(group, sizes[group]), start=1):
                progress("writing the sample edition", done, sum(sizes))
                image = f"images/{name}-{number}.jpg"
                (root / image).write_bytes(row.pop("picture"))
                row = {"id": f"{name}-{number}", "image": image} | row
                index.write(json.dumps(row | {"group": name, "split": split}) + "\n")
                done += 1


def cut(sizes: np.ndarray, rows: int) -> list[int]:
    """The first of these sizes of groups, the last one cut so that all are `rows`."""
    ends = np.cumsum(sizes)
    number = int(np.searchsorted(ends, rows)) + 1
    return [
        *sizes[: number - 1].tolist(),
        rows - int(ends[number - 1] - sizes[number - 1]),
    ]


def _splits(sizes: list[int], seed: int) -> list[str]:
    """A split for each group, so that the rows have the shares of _SHARES."""
    order = np.random.default_rng([seed, 1]).permutation(len(sizes))
    ends = np.cumsum(np.array(sizes)[order])
    limits = np.cumsum(list(_SHARES.values())) * ends[-1]
    place = np.searchsorted(limits, ends - np.array(sizes)[order] / 2)
    names, splits = list(_SHARES), [""] * len(sizes)
    for group, split in zip(order, place, strict=True):
        splits[group] = names[min(int(split), len(names) - 1)]
    return splits
