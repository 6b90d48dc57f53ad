"""Which rows are forgotten, which are kept, and which were never trained on.

For each data set and seed there is one order of all training groups. The rows never
trained on (`unseen`, the attack's control) are taken from its end and a random unlearn
set from its beginning, so that 1 % is a prefix of 5 %, whatever else is asked for. What
other rules choose, and how much of the rows set apart, is in `unlearn_rules.py`.
"""

import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from ccu_jax.data.near_duplicates import connected_components
from ccu_jax.errors import UserError
from ccu_jax.storage.records import add_line_checksum, lines_are_intact
from ccu_jax.unlearn_sets import rules as unlearn_rules
from ccu_jax.unlearn_sets.ids import read_ids
from ccu_jax.unlearn_sets.rules import Memorization, Selection, TrainingGroups


class Sets(NamedTuple):
    """Row numbers of a data set, each array sorted, no row in two of them.

    The original is trained on `retain` and `unlearn`. `unseen` are rows of the same
    distribution as `unlearn` that no model has seen.
    """

    retain: np.ndarray
    unlearn: np.ndarray
    unseen: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def merge_near_duplicates(data, duplicates: str) -> np.ndarray:
    """The groups `[N]` of rows that are forgotten together.

    Those of the data set; with `duplicates="forget"` groups with pictures that are
    nearly the same are one, named after that of the first row.
    """
    rows = np.arange(len(data.group))
    if duplicates == "report" or (data.cluster == rows).all():
        return data.group
    _, first, which = np.unique(data.group, return_index=True, return_inverse=True)
    pairs = [np.stack([first[which], rows], 1), np.stack([data.cluster, rows], 1)]
    return data.group[connected_components(len(rows), np.concatenate(pairs))]


def near_duplicates(data, sets: Sets) -> dict[str, np.ndarray]:
    """Rows with nearly the picture of an unlearn row of another group, by set.

    Where they are retained, their pictures go on teaching what was to be forgotten; in
    the unlearn set they are forgotten with each other.
    """
    shown = sets.unlearn[data.has_image[sets.unlearn]]
    clusters = data.cluster[shown]
    near = {
        name: rows[np.isin(data.cluster[rows], clusters) & data.has_image[rows]]
        for name, rows in sets._asdict().items()
    }
    # Rows of one group belong together anyway.
    pairs = np.unique(np.stack([clusters, _group_numbers(data.group[shown])]), axis=1)
    of, groups = np.unique(pairs[0], return_counts=True)
    near["unlearn"] = shown[np.isin(clusters, of[groups > 1])]
    return near


def _group_numbers(names: np.ndarray) -> np.ndarray:
    return np.unique(names, return_inverse=True)[1]


def forgetting_order(data, seed: int) -> list[str]:
    """All training groups in the order in which this seed would forget them."""
    groups = np.unique(data.group[data.split == "train"])

    def place(group):
        text = f"{data.name}/{seed}/{group}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    return sorted((str(g) for g in groups), key=place)


def draw_sets(
    data,
    rule: str,
    seed: int,
    unseen: float,
    duplicates: str = "forget",
    memory: Memorization | None = None,
) -> Sets:
    """Draw the sets.

    Args:
        data: a `ccu_jax.data.Dataset`.
        rule: `random:SHARE` of the rows that are trained on, `class:NAME`,
            `group:NAME`, `cluster:SHARE` of rows that are alike, `memorised:SHARE` of
            what the original knows by heart, or `ids:FILE` with one id a line (a hash
            sign and a space start a comment).
        seed: of the order.
        unseen: share of the training rows that is kept apart.
        duplicates: "forget": a near-duplicate of a forgotten picture goes with it.
        memory: of the original that was trained on `retain` and `unlearn`.

    Returns:
        The sets. Of `memorised` without a memory those to train the original with: it
        hangs on no unlearn set, and all that is trained on is still in `retain`.

    Raises:
        UserError: a rule that cannot be followed; an unlearn set that is empty or
            everything.
    """
    parsed = unlearn_rules.parse_rule(rule)
    if not 0 < unseen < 1:
        raise UserError(f"unlearn.holdout_fraction={unseen} must lie between 0 and 1")
    group_N = merge_near_duplicates(data, duplicates)
    listed = unlearn_rules.groups_by_name(data, parsed, group_N)
    data = data._replace(group=group_N)
    pool = _split_groups(data, seed, unseen, listed)
    late = parsed.kind == "memorised" and memory is None
    if late:
        choice = Selection(set(), set(pool.holdout))
    else:
        choice = unlearn_rules.select_groups(data, parsed, pool, listed, memory)
    sets = Sets(
        retain=_rows_of_groups(
            pool, (g for g in pool.trained if g not in choice.forgotten)
        ),
        unlearn=_rows_of_groups(pool, choice.forgotten),
        unseen=_rows_of_groups(pool, choice.nonmembers),
        validation=np.flatnonzero(data.split == "validation"),
        test=np.flatnonzero(data.split == "test"),
    )
    _check_sets(data, sets, rule, late)
    return sets


def _split_groups(data, seed, unseen, listed) -> TrainingGroups:
    """Set groups apart, from the end of the order; none that is to be forgotten."""
    groups, rows_of = forgetting_order(data, seed), _rows_by_group(data)
    count = round(unseen * sum(map(len, rows_of.values())))
    free = [group for group in reversed(groups) if group not in listed]
    apart = set(unlearn_rules.take_groups(free, rows_of, count))
    return TrainingGroups(
        rows_of,
        trained=[group for group in groups if group not in apart],
        holdout=[group for group in groups if group in apart],
    )


def groups_in_order(data, sets: Sets, seed: int, duplicates: str = "forget") -> list:
    """The rows of each forgotten group, the groups in the order of forgetting."""
    data = data._replace(group=merge_near_duplicates(data, duplicates))
    rows_of = _rows_by_group(data)
    chosen = set(sets.unlearn.tolist())
    groups = (rows_of[group] for group in forgetting_order(data, seed))
    # No group is split: its first row stands for all.
    return [np.array(rows) for rows in groups if rows[0] in chosen]


def format_unlearn_set(
    data, sets: Sets, seed: int, rule: str, duplicates: str = "forget"
) -> str:
    """The unlearn set as text: one id a line in the order of forgetting, with a header.

    Such a text is itself a file for the rule `ids:FILE`.
    """
    groups = groups_in_order(data, sets, seed, duplicates)
    lines = [
        f"# {data.name}, seed {seed}, rule {rule}: the pictures of these rows are",
        "# to be forgotten; rows of one group follow each other",
        *(str(data.id[row]) for rows in groups for row in rows),
    ]
    return add_line_checksum("\n".join(lines) + "\n")


def check_intact(path: pathlib.Path) -> None:
    """Refuses a file of `describe` that is not as it was written.

    Raises:
        UserError: it was damaged, or changed.
    """
    try:
        if lines_are_intact(path.read_bytes().decode()):
            return
    except UnicodeDecodeError:
        pass
    raise UserError(
        f"{path} is damaged, or was changed: remove it, and the same command writes it "
        f"once more, if seed {path.stem} is among its seeds"
    )


def format_near_duplicates(data, sets: Sets, near: dict[str, np.ndarray]) -> str:
    """Near-duplicates as lines of set, id, and the id of a forgotten row like it."""
    like = {int(data.cluster[row]): str(data.id[row]) for row in sets.unlearn[::-1]}
    found = [
        (name, str(data.id[row]), like[int(data.cluster[row])])
        for name, rows in near.items()
        for row in rows
    ]
    # The first of those that are forgotten together stands for the others.
    lines = ["\t".join(line) for line in found if line[1] != line[2]]
    return "\n".join(["set\tid\tforgotten", *lines]) + "\n"


def load_all_ids(data, folder: pathlib.Path, duplicates: str) -> set[str]:
    """The ids in all files of unlearn sets in a folder.

    With `duplicates="forget"` also those of the same pictures in any other set.

    Raises:
        UserError: one was damaged.
    """
    ids = set()
    for path in folder.glob("*.txt"):
        check_intact(path)
        ids |= set(read_ids(path))
    rows = np.isin(data.id, sorted(ids))
    if duplicates == "forget":
        rows = np.isin(data.cluster, data.cluster[rows])
    return {str(i) for i in data.id[rows]}


def _rows_by_group(data):
    rows_by_group: dict[str, list[int]] = {}
    for row in np.flatnonzero(data.split == "train"):
        rows_by_group.setdefault(str(data.group[row]), []).append(int(row))
    return rows_by_group


def _rows_of_groups(pool, groups):
    return np.sort(
        np.array([r for g in groups for r in pool.rows_by_group[g]], np.int64)
    )


def _check_sets(data, sets, rule, late):
    if late:
        sets = sets._replace(unlearn=sets.retain)
    if not len(sets.unlearn):
        raise UserError(
            f"unlearn rule {rule} selects no training row: there is nothing to forget"
        )
    if not data.has_image[sets.unlearn].any():
        raise UserError(
            f"unlearn rule {rule} selects rows without a picture only: there is "
            "nothing to forget; choose others"
        )
    if not len(sets.retain):
        raise UserError(
            f"unlearn rule {rule} selects every training row: nothing would be "
            "retained; train a new model without them instead (or, if near-duplicates "
            "have brought them in, set unlearn.duplicates=report)"
        )
    for name in ("unseen", "validation", "test"):
        if not len(getattr(sets, name)):
            raise UserError(
                f"unlearn rule {rule}: the {name} set is empty; give the data more "
                "rows or change data.validation_fraction, data.test_fraction or "
                "unlearn.holdout_fraction"
            )
    for name in ("retain", "unseen", "validation"):
        if not data.has_image[getattr(sets, name)].any():
            raise UserError(
                f"unlearn rule {rule}: no row of the {name} set has a picture, so "
                "nothing can be said of pictures; give the data more rows that do"
            )
