"""Which rows are forgotten, which are kept, and which were never trained on.

For each data set and seed there is one order of all training groups. The rows never
trained on (`unseen`, the attack's control) are taken from its end and the unlearn set
from its beginning, so that 1 % is a prefix of 5 %, whatever else is asked for.
"""

import collections
import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from ccu_jax.data.duplicates import connected
from ccu_jax.errors import UserError


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


DUPLICATES = ("forget", "report")


def joined(data, duplicates: str) -> np.ndarray:
    """The groups `[N]` of rows that are forgotten together.

    Those of the data set; with `duplicates="forget"` groups with pictures that are
    nearly the same are one, named after that of the first row.
    """
    if duplicates not in DUPLICATES:
        raise UserError(
            f"unlearn.duplicates: {duplicates!r} is none of {', '.join(DUPLICATES)}"
        )
    rows = np.arange(len(data.group))
    if duplicates == "report" or (data.cluster == rows).all():
        return data.group
    _, first, which = np.unique(data.group, return_index=True, return_inverse=True)
    pairs = [np.stack([first[which], rows], 1), np.stack([data.cluster, rows], 1)]
    return data.group[connected(len(rows), np.concatenate(pairs))]


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
    pairs = np.unique(np.stack([clusters, _numbers(data.group[shown])]), axis=1)
    of, groups = np.unique(pairs[0], return_counts=True)
    near["unlearn"] = shown[np.isin(clusters, of[groups > 1])]
    return near


def _numbers(names: np.ndarray) -> np.ndarray:
    return np.unique(names, return_inverse=True)[1]


def order(data, seed: int) -> list[str]:
    """All training groups in the order in which this seed would forget them."""
    groups = np.unique(data.group[data.split == "train"])

    def place(group):
        text = f"{data.name}/{seed}/{group}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    return sorted((str(g) for g in groups), key=place)


def draw(data, rule: str, seed: int, unseen: float, duplicates: str = "forget") -> Sets:
    """Draw the sets.

    Args:
        data: a `ccu_jax.data.Dataset`.
        rule: `random:SHARE` of the training rows, `class:NAME`, or `ids:FILE` with one
            id a line (a hash sign and a space start a comment).
        seed: of the order.
        unseen: share of the training rows that is kept apart.
        duplicates: "forget": a near-duplicate of a forgotten picture goes with it.

    Raises:
        UserError: a rule that cannot be followed; an unlearn set that is empty or
            everything.
    """
    kind, _, what = rule.partition(":")
    if kind not in ("random", "class", "ids") or not what:
        raise UserError(
            f"unlearn rule {rule!r}: use random:SHARE, class:NAME or ids:FILE"
        )
    if not 0 < unseen < 1:
        raise UserError(f"unlearn.unseen={unseen} must lie between 0 and 1")
    data = data._replace(group=joined(data, duplicates))
    groups = order(data, seed)
    rows_of = _rows_by_group(data)
    listed = (
        _listed_groups(data, pathlib.Path(what).expanduser())
        if kind == "ids"
        else set()
    )
    total = sum(len(rows_of[g]) for g in groups)
    free = [g for g in groups if g not in listed]
    apart = set(_take(reversed(free), rows_of, round(unseen * total)))
    trained = [g for g in groups if g not in apart]
    num_trained = sum(len(rows_of[g]) for g in trained)
    if kind == "random":
        share = _share(what)
        forgotten = set(_take(trained, rows_of, max(1, round(share * num_trained))))
    elif kind == "ids":
        forgotten = listed
    else:
        forgotten = {g for g in trained if _has_class(data, rows_of[g], what)}
        # The control must come from the same distribution: the same class.
        apart_rows = {g for g in apart if _has_class(data, rows_of[g], what)}
    sets = Sets(
        retain=_join(rows_of, (g for g in trained if g not in forgotten)),
        unlearn=_join(rows_of, forgotten),
        unseen=_join(rows_of, apart_rows if kind == "class" else apart),
        validation=np.flatnonzero(data.split == "validation"),
        test=np.flatnonzero(data.split == "test"),
    )
    _check(data, sets, rule)
    return sets


def describe(data, sets: Sets, seed: int, rule: str, duplicates: str = "forget") -> str:
    """The unlearn set as text: one id a line in the order of forgetting, with a header.

    Such a text is itself a file for the rule `ids:FILE`.
    """
    data = data._replace(group=joined(data, duplicates))
    rows_of = _rows_by_group(data)
    chosen = set(sets.unlearn.tolist())
    rows = [row for group in order(data, seed) for row in rows_of[group]]
    lines = [
        f"# {data.name}, seed {seed}, rule {rule}: the pictures of these rows are",
        "# to be forgotten; rows of one group follow each other",
        *(str(data.id[row]) for row in rows if row in chosen),
    ]
    return "\n".join(lines) + "\n"


def describe_near(data, sets: Sets, near: dict[str, np.ndarray]) -> str:
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


def recorded(data, folder: pathlib.Path, duplicates: str) -> set[str]:
    """The ids in all files of unlearn sets in a folder.

    With `duplicates="forget"` also those of the same pictures in any other set.
    """
    ids = {i for path in folder.glob("*.txt") for i in _ids(path)}
    rows = np.isin(data.id, sorted(ids))
    if duplicates == "forget":
        rows = np.isin(data.cluster, data.cluster[rows])
    return {str(i) for i in data.id[rows]}


def _rows_by_group(data):
    rows_of: dict[str, list[int]] = {}
    for row in np.flatnonzero(data.split == "train"):
        rows_of.setdefault(str(data.group[row]), []).append(int(row))
    return rows_of


def _take(groups, rows_of, count):
    """The first groups that together have at least `count` rows."""
    taken = 0
    for group in groups:
        if taken >= count:
            return
        taken += len(rows_of[group])
        yield group


def _join(rows_of, groups):
    return np.sort(np.array([r for g in groups for r in rows_of[g]], np.int64))


def _share(text):
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UserError(
            f"unlearn rule random:{text}: the share must lie between 0 and 1, like 0.1"
        )
    return share


def _has_class(data, rows, name):
    if name not in data.classes:
        raise UserError(
            f"unlearn rule class:{name}: no such class; there are "
            f"{', '.join(data.classes)}"
        )
    return bool(data.labels[rows, data.classes.index(name)].any())


def _listed_groups(data, path):
    ids = _ids(path)
    twice = [i for i, times in collections.Counter(ids).items() if times > 1]
    if twice:
        raise UserError(
            f"unlearn ids: {path} lists {_some(twice)} more than once: list each once"
        )
    where = dict(zip(data.id.tolist(), range(len(data.id)), strict=True))
    missing = [i for i in ids if i not in where]
    if missing:
        raise UserError(
            f"unlearn ids: {path} lists {_some(missing)}, which the data set "
            f"{data.name} does not have: correct or remove them"
        )
    foreign = [i for i in ids if data.split[where[i]] != "train"]
    if foreign:
        raise UserError(
            f"unlearn ids: {path} lists {_some(foreign)}, which the model is not "
            "trained on (validation or test rows): remove them"
        )
    return {str(data.group[where[i]]) for i in ids}


def _ids(path: pathlib.Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"unlearn ids: cannot read {path}: {error}") from None
    ids = [line.strip() for line in lines]
    # An id may itself begin with a hash sign: a comment has a space after it.
    return [i for i in ids if i and not f"{i} ".startswith("# ")]


def _some(items, most=3):
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(repr(i) for i in items[:most]) + more


def _check(data, sets, rule):
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
                "rows or change data.validation, data.test or unlearn.unseen"
            )
    for name in ("retain", "unseen", "validation"):
        if not data.has_image[getattr(sets, name)].any():
            raise UserError(
                f"unlearn rule {rule}: no row of the {name} set has a picture, so "
                "nothing can be said of pictures; give the data more rows that do"
            )
