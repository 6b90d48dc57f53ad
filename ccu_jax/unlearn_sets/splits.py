"""Splits the rows of a data set into retain, unlearn, holdout, validation and test.

The data set and the seed determine an order of all training groups, the unlearning
order. The holdout (`unseen`) is taken from its end, and a random unlearn set from its
beginning, so the rule random:0.01 selects a prefix of random:0.05, whatever the
other settings. Other rules are in `rules.py`.
"""

import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from ccu_jax.data import Dataset
from ccu_jax.data.near_duplicates import connected_components
from ccu_jax.errors import UserError
from ccu_jax.storage.records import add_line_checksum, has_valid_checksum
from ccu_jax.unlearn_sets.ids import read_ids
from ccu_jax.unlearn_sets.rules import (
    Memorization,
    Selection,
    TrainingGroups,
    find_named_groups,
    parse_rule,
    select_groups,
    take_groups,
)


class Sets(NamedTuple):
    """Disjoint, sorted row numbers; the original trains on `retain` and `unlearn`."""

    retain: np.ndarray
    unlearn: np.ndarray
    unseen: np.ndarray  # the non-members: held-out training rows
    validation: np.ndarray
    test: np.ndarray


def merge_near_duplicates(data: Dataset, duplicates: str) -> np.ndarray:
    """Merges groups with near-duplicates and returns each row's group `[N]`.

    A merged group has the name of the group of its first row. With
    `duplicates="report"`, the groups are returned unchanged.
    """
    rows = np.arange(len(data.group))
    if duplicates == "report" or (data.cluster == rows).all():
        return data.group
    _, first, inverse = np.unique(data.group, return_index=True, return_inverse=True)
    same_group = np.stack([first[inverse], rows], 1)
    same_cluster = np.stack([data.cluster, rows], 1)
    pairs = np.concatenate([same_group, same_cluster])
    return data.group[connected_components(len(rows), pairs)]


def find_near_duplicates(data: Dataset, sets: Sets) -> dict[str, np.ndarray]:
    """Returns, for each set, the rows with a near-duplicate of an unlearned image.

    Only near-duplicates in other groups count. Those in the retain set still teach the
    model the image; those in the unlearn set are unlearned as well.
    """
    with_image = sets.unlearn[data.has_image[sets.unlearn]]
    clusters = data.cluster[with_image]
    near = {
        name: rows[np.isin(data.cluster[rows], clusters) & data.has_image[rows]]
        for name, rows in sets._asdict().items()
    }
    group_numbers = np.unique(data.group[with_image], return_inverse=True)[1]
    pairs = np.unique(np.stack([clusters, group_numbers]), axis=1)
    cluster, num_groups = np.unique(pairs[0], return_counts=True)
    near["unlearn"] = with_image[np.isin(clusters, cluster[num_groups > 1])]
    return near


def unlearning_order(data: Dataset, seed: int) -> list[str]:
    """Returns the training groups in random order; `random:` takes the first ones."""
    groups = np.unique(data.group[data.split == "train"])

    def sort_key(group: str) -> bytes:
        text = f"{data.name}/{seed}/{group}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    return sorted((str(group) for group in groups), key=sort_key)


def draw_sets(
    data: Dataset,
    rule: str,
    seed: int,
    holdout_fraction: float,
    duplicates: str = "forget",
    memorization: Memorization | None = None,
) -> Sets:
    """Splits the rows of a data set for a rule and the unlearning order of a seed.

    Args:
        rule: see `rules.KINDS`, for example "random:0.1".
        holdout_fraction: fraction of the training rows to hold out.
        duplicates: "forget" to unlearn near-duplicates of unlearned images as well, or
            "report" to only list them.
        memorization: estimates for an original trained on `retain` and `unlearn`.

    Without `memorization`, the rule `memorized` returns an empty `unlearn`, and a
    `retain` with all rows that the original trains on. Raises UserError if the rule is
    invalid for the data, or a set would be empty.
    """
    parsed = parse_rule(rule)
    if not 0 < holdout_fraction < 1:
        raise UserError(
            f"unlearn.holdout_fraction={holdout_fraction}: must be between 0 and 1"
        )
    group_N = merge_near_duplicates(data, duplicates)
    named = find_named_groups(data, parsed, group_N)
    data = data._replace(group=group_N)
    groups = _hold_out(data, seed, holdout_fraction, named)
    is_deferred = parsed.kind == "memorized" and memorization is None
    if is_deferred:
        selection = Selection(set(), set(groups.holdout))
    else:
        selection = select_groups(data, parsed, groups, named, memorization)
    sets = Sets(
        retain=np.sort(groups.rows(set(groups.trained) - selection.unlearn)),
        unlearn=np.sort(groups.rows(selection.unlearn)),
        unseen=np.sort(groups.rows(selection.nonmembers)),
        validation=np.flatnonzero(data.split == "validation"),
        test=np.flatnonzero(data.split == "test"),
    )
    _check_sets(data, sets._replace(unlearn=sets.retain) if is_deferred else sets, rule)
    return sets


def _hold_out(
    data: Dataset, seed: int, fraction: float, named: set[str]
) -> TrainingGroups:
    """Holds out groups from the end of the unlearning order, except `named`."""
    order, rows_by_group = unlearning_order(data, seed), _group_rows(data)
    count = round(fraction * sum(map(len, rows_by_group.values())))
    candidates = (group for group in reversed(order) if group not in named)
    holdout = set(take_groups(candidates, rows_by_group, count))
    return TrainingGroups(
        rows_by_group,
        trained=[group for group in order if group not in holdout],
        holdout=[group for group in order if group in holdout],
    )


def _group_rows(data: Dataset) -> dict[str, list[int]]:
    rows_by_group: dict[str, list[int]] = {}
    for row in np.flatnonzero(data.split == "train"):
        rows_by_group.setdefault(str(data.group[row]), []).append(int(row))
    return rows_by_group


def _check_sets(data: Dataset, sets: Sets, rule: str) -> None:
    """Raises UserError if a set is empty, or has no image where one is needed."""

    def require(condition: bool | np.bool, problem: str) -> None:
        if not condition:
            raise UserError(f"unlearn rule {rule}: {problem}")

    require(len(sets.unlearn) > 0, "selects no training row; select others")
    require(
        data.has_image[sets.unlearn].any(),
        "selects only rows without an image; select rows with images",
    )
    require(
        len(sets.retain) > 0,
        "selects every training row, so none is retained; train a new model without "
        "them, or, if near-duplicates were added, pass --set unlearn.duplicates=report",
    )
    for name in ("unseen", "validation", "test"):
        require(
            len(getattr(sets, name)) > 0,
            f"the {name} set is empty; add rows to the data, or change "
            "data.validation_fraction, data.test_fraction or unlearn.holdout_fraction",
        )
    for name in ("retain", "unseen", "validation"):
        require(
            data.has_image[getattr(sets, name)].any(),
            f"no row of the {name} set has an image, so image predictions cannot be "
            "evaluated; add rows with images to the data",
        )


def list_unlearned_groups(
    data: Dataset, sets: Sets, seed: int, duplicates: str = "forget"
) -> list[np.ndarray]:
    """Returns the rows of each unlearned group, in the unlearning order."""
    data = data._replace(group=merge_near_duplicates(data, duplicates))
    rows_by_group = _group_rows(data)
    unlearn = set(sets.unlearn.tolist())
    groups = (rows_by_group[group] for group in unlearning_order(data, seed))
    # A group is unlearned as a whole, so its first row is sufficient.
    return [np.array(rows) for rows in groups if rows[0] in unlearn]


def format_unlearn_set(
    data: Dataset, sets: Sets, seed: int, rule: str, duplicates: str = "forget"
) -> str:
    """Returns the ids of the unlearn set as lines, in the unlearning order.

    The last line is a checksum. The text can be the file of a rule `ids:FILE`.
    """
    groups = list_unlearned_groups(data, sets, seed, duplicates)
    lines = [
        f"# {data.name}, seed {seed}, rule {rule}: the images of these rows are",
        "# unlearned; rows of one group follow each other",
        *(str(data.id[row]) for rows in groups for row in rows),
    ]
    return add_line_checksum("\n".join(lines) + "\n")


def check_intact(path: pathlib.Path) -> None:
    """Raises UserError if an unlearn set file is damaged or was edited."""
    # A byte that is not UTF-8 fails the checksum as well.
    if not has_valid_checksum(path.read_bytes().decode(errors="replace")):
        raise UserError(
            f"{path}: damaged or edited; remove it and rerun the same command with "
            f"seed {path.stem} among its seeds"
        )


def format_near_duplicates(
    data: Dataset, sets: Sets, duplicates: dict[str, np.ndarray]
) -> str:
    """Returns a tab-separated table of near-duplicates and their unlearned rows."""
    unlearned = {int(data.cluster[r]): str(data.id[r]) for r in sets.unlearn[::-1]}
    triples = [
        (name, str(data.id[row]), unlearned[int(data.cluster[row])])
        for name, rows in duplicates.items()
        for row in rows
    ]
    lines = ["\t".join(triple) for triple in triples if triple[1] != triple[2]]
    return "\n".join(["set\tid\tforgotten", *lines]) + "\n"


def load_all_ids(data: Dataset, folder: pathlib.Path, duplicates: str) -> set[str]:
    """Returns the ids in all unlearn set files of a folder.

    With `duplicates="forget"`, adds the ids of near-duplicates of their images. Raises
    UserError if a file is damaged.
    """
    ids = set()
    for path in folder.glob("*.txt"):
        check_intact(path)
        ids |= set(read_ids(path))
    rows = np.isin(data.id, sorted(ids))
    if duplicates == "forget":
        rows = np.isin(data.cluster, data.cluster[rows])
    return {str(id_) for id_ in data.id[rows]}
