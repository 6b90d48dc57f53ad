"""Rules that select the unlearn set, such as `random:0.1` or `class:Comedy`.

Attacks compare the unlearn set with non-members: rows of held-out groups, on which only
shadow models are trained. If a rule selects rows of one kind, such as a class, it
selects held-out groups of the same kind as non-members.
"""

import bisect
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ccu_jax.data import Dataset
from ccu_jax.errors import UserError
from ccu_jax.unlearn_sets.ids import find_group_rows, find_id_rows, read_ids
from ccu_jax.unlearn_sets.similarity import compute_similarity

KINDS = {
    "random": "FRACTION",
    "class": "NAME",
    "group": "NAME",
    "cluster": "FRACTION",
    "memorized": "FRACTION",
    "ids": "FILE",
}
# Rules that need images or features, which a purge removes.
DATA_DEPENDENT = ("cluster", "memorized")
# With fewer non-member rows, the standard error of an attack AUC exceeds 0.06.
MIN_NONMEMBERS = 40


class Rule(NamedTuple):
    """A rule: the kind before the colon, and the argument after it."""

    kind: str
    argument: str

    def __str__(self) -> str:
        """Returns the rule as the user wrote it."""
        return f"{self.kind}:{self.argument}"

    @property
    def fraction(self) -> float:
        """The fraction of the original's training rows to unlearn."""
        return float(self.argument)


class TrainingGroups(NamedTuple):
    """The groups of the training rows, in the unlearning order of a seed."""

    rows_by_group: dict[str, list[int]]  # row numbers of each group
    trained: list[str]  # groups that the original is trained on
    holdout: list[str]  # held-out groups, the candidates for non-members

    def rows(self, groups: Iterable[str]) -> np.ndarray:
        """Returns the row numbers of `groups`, group by group."""
        rows = [row for group in groups for row in self.rows_by_group[group]]
        return np.array(rows, np.int64)

    def means(
        self, groups: Sequence[str], value_N: np.ndarray, mask_N: np.ndarray
    ) -> np.ndarray:
        """Returns each group's mean of `value_N` over its rows in `mask_N`, or -inf."""
        sizes = [len(self.rows_by_group[group]) for group in groups]
        rows, group_of_row = self.rows(groups), np.repeat(np.arange(len(sizes)), sizes)
        rows, group_of_row = rows[mask_N[rows]], group_of_row[mask_N[rows]]
        total = np.bincount(group_of_row, value_N[rows].astype(float), len(sizes))
        count = np.bincount(group_of_row, minlength=len(sizes))
        return np.where(count > 0, total / np.maximum(count, 1), -np.inf)


class Memorization(NamedTuple):
    """Memorization estimates of each row (see `evaluate/memorization.py`)."""

    score: np.ndarray  # [N], how strongly the original has memorized the row
    easiness: np.ndarray  # [N], how well a model that never saw the row predicts it


class Selection(NamedTuple):
    """The groups to unlearn, and the held-out groups that serve as non-members."""

    unlearn: set[str]
    nonmembers: set[str]


def parse_rule(text: str) -> Rule:
    """Parses a rule such as "random:0.1"; raises UserError if it is malformed."""
    rule = Rule(*text.partition(":")[::2])
    if rule.kind not in KINDS or not rule.argument:
        *forms, last = (f"{kind}:{argument}" for kind, argument in KINDS.items())
        raise UserError(f"unlearn rule {text!r}: expected {', '.join(forms)} or {last}")
    if KINDS[rule.kind] == "FRACTION":
        try:
            fraction = rule.fraction
        except ValueError:
            fraction = -1.0
        if not 0 < fraction < 1:
            raise UserError(
                f"unlearn rule {rule}: expected a fraction between 0 and 1, such as 0.1"
            )
    return rule


def check_rule(text: str) -> None:
    """Raises UserError if a rule is malformed, or its file cannot be read."""
    rule = parse_rule(text)
    if rule.kind == "ids":
        read_ids(pathlib.Path(rule.argument).expanduser())


def find_named_groups(data: Dataset, rule: Rule, group_N: np.ndarray) -> set[str]:
    """Returns the groups that a `group` or `ids` rule names; else an empty set.

    The caller must not hold them out. Raises UserError if a group or an id is unknown,
    or the file cannot be read.
    """
    find_rows = {"group": find_group_rows, "ids": find_id_rows}.get(rule.kind)
    rows = [] if find_rows is None else find_rows(data, rule.argument)
    return {str(group) for group in group_N[rows]}


def select_groups(
    data: Dataset,
    rule: Rule,
    groups: TrainingGroups,
    named: set[str],
    memorization: Memorization | None,
) -> Selection:
    """Selects the groups to unlearn and their non-members.

    `named` is the result of `find_named_groups`. Only rules of the kind `memorized`
    need `memorization`. Raises UserError if the class is unknown.
    """
    if rule.kind not in _SELECTORS:
        return Selection(named, set(groups.holdout))
    if not groups.trained:
        return Selection(set(), set())
    return _SELECTORS[rule.kind](data, rule, groups, memorization)


def take_groups(
    groups: Iterable[str], rows_by_group: dict[str, list[int]], count: int
) -> Iterator[str]:
    """Yields the shortest prefix of `groups` with at least `count` rows in total."""
    num_rows = 0
    for group in groups:
        if num_rows >= count:
            return
        num_rows += len(rows_by_group[group])
        yield group


def _take_fraction(
    rule: Rule, groups: TrainingGroups, ordered: Iterable[str]
) -> set[str]:
    """Returns a prefix of `ordered` with the rule's fraction of the trained rows."""
    count = max(1, round(rule.fraction * len(groups.rows(groups.trained))))
    return set(take_groups(ordered, groups.rows_by_group, count))


def _select_random(data, rule, groups, memorization) -> Selection:
    unlearn = _take_fraction(rule, groups, groups.trained)
    return Selection(unlearn, set(groups.holdout))


def _select_class(data, rule, groups, memorization) -> Selection:
    """Selects all groups that contain a row of the class."""
    if rule.argument not in data.classes:
        classes = ", ".join(data.classes)
        raise UserError(f"unlearn rule {rule}: no such class; choose from: {classes}")
    has_class = data.labels[:, data.classes.index(rule.argument)] > 0

    def select(names):
        return {name for name in names if has_class[groups.rows_by_group[name]].any()}

    return Selection(select(groups.trained), select(groups.holdout))


def _select_cluster(data, rule, groups, memorization) -> Selection:
    """Selects the groups most similar to the first group that has an image.

    Non-members are the most similar held-out groups: the same fraction of the held-out
    rows, so that both are equally similar, but at least MIN_NONMEMBERS rows.
    """
    has_image = [data.has_image[groups.rows([name])].any() for name in groups.trained]
    center = groups.rows([groups.trained[int(np.argmax(has_image))]])
    rows = np.sort(groups.rows([*groups.trained, *groups.holdout]))
    similarity_N = np.zeros(len(data.id))
    similarity_N[rows] = compute_similarity(data, rows, center)
    similarity_N[center] = np.inf  # so that it is always selected
    all_rows = np.ones(len(similarity_N), bool)

    def sort_by_similarity(names):
        return _sort_descending(names, groups.means(names, similarity_N, all_rows))

    num_holdout = len(groups.rows(groups.holdout))
    count = max(MIN_NONMEMBERS, round(rule.fraction * num_holdout))
    nonmembers = take_groups(
        sort_by_similarity(groups.holdout), groups.rows_by_group, count
    )
    unlearn = _take_fraction(rule, groups, sort_by_similarity(groups.trained))
    return Selection(unlearn, set(nonmembers))


def _select_memorized(data, rule, groups, memorization) -> Selection:
    """Selects the groups whose images the original has memorized most.

    These are hard to predict without training on them. The non-members are therefore
    held-out groups with a similar distribution of easiness: the same fraction of the
    groups, but at least MIN_NONMEMBERS rows. No held-out row is memorized, so an attack
    must be compared with the same attack on the reference.
    """
    if memorization is None:
        raise ValueError(
            "memorization: pass the estimates that the rule `memorized` reads"
        )

    def group_means(names, value_N):
        """Returns the groups that have an image, and their means over such rows."""
        means = groups.means(names, value_N, data.has_image)
        has_image = np.isfinite(means)
        return list(itertools.compress(names, has_image)), means[has_image]

    trained, score = group_means(groups.trained, memorization.score)
    unlearn = _take_fraction(rule, groups, _sort_descending(trained, score))
    unlearned = [name for name in groups.trained if name in unlearn]
    _, target = group_means(unlearned, memorization.easiness)
    holdout, available = group_means(groups.holdout, memorization.easiness)
    rows_per_group = max(1, len(groups.rows(holdout))) / max(1, len(holdout))
    min_groups = MIN_NONMEMBERS / rows_per_group
    count = math.ceil(max(min_groups, rule.fraction * len(holdout)))
    matched = match_distribution(target, available, min(len(holdout), count))
    return Selection(unlearn, {holdout[index] for index in matched})


_Selector = Callable[[Dataset, Rule, TrainingGroups, Memorization | None], Selection]
_SELECTORS: dict[str, _Selector] = {
    "random": _select_random,
    "class": _select_class,
    "cluster": _select_cluster,
    "memorized": _select_memorized,
}


def match_distribution(
    target: np.ndarray, available: np.ndarray, count: int
) -> list[int]:
    """Returns the indices of `count` available values distributed like the target.

    For each of `count` evenly spaced quantiles of the target, in ascending order, it
    selects the nearest value that is not selected yet. Selects none if the target is
    empty.
    """
    if not len(target):
        return []
    indices = np.argsort(available, kind="stable").tolist()
    values, chosen = np.asarray(available)[indices].tolist(), []
    levels = (np.arange(count) + 0.5) / max(count, 1)
    for quantile in np.quantile(target, levels, method="inverted_cdf").tolist():
        i = bisect.bisect_left(values, quantile)
        is_last = i == len(values)
        if is_last or (i and quantile - values[i - 1] <= values[i] - quantile):
            i -= 1
        values.pop(i)
        chosen.append(indices.pop(i))
    return chosen


def _sort_descending(names: Sequence[str], values: np.ndarray) -> list[str]:
    """Sorts names by descending value; the sort is stable."""
    return [names[index] for index in np.argsort(-values, kind="stable")]
