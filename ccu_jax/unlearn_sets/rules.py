"""The kinds of rules that say what is forgotten: one function for each.

Two kinds look beyond names and labels: `cluster` at pictures and texts, `memorised` at
what the original says of them. The rows set apart as the attack's control are drawn at
random, but these rows are not like all: of the groups set apart those serve that the
rule would have come upon, too.
"""

import bisect
import math
import pathlib
from typing import NamedTuple

import numpy as np

from ccu_jax.errors import UserError
from ccu_jax.unlearn_sets import ids as unlearn_names
from ccu_jax.unlearn_sets import similarity as nearness

KINDS = {
    "random": "SHARE",
    "class": "NAME",
    "group": "NAME",
    "cluster": "SHARE",
    "memorised": "SHARE",
    "ids": "FILE",
}
_NAMED = {"group": unlearn_names.rows_of_group, "ids": unlearn_names.rows_of_ids}
# What they choose hangs on pictures or features, which a purge takes away.
DATA_DEPENDENT = ("cluster", "memorised")
# An attack on fewer rows than so many tells hardly anything: the standard error of an
# AUC is .06 and more with them.
MIN_NONMEMBERS = 40


class Rule(NamedTuple):
    """A kind of rule and what follows its colon."""

    kind: str
    what: str

    def __str__(self) -> str:
        """As it was given."""
        return f"{self.kind}:{self.what}"

    @property
    def share(self) -> float:
        """Of the rows that are trained on."""
        return float(self.what)


class TrainingGroups(NamedTuple):
    """Training rows by group: `trained` groups and those set `apart`, in seed order."""

    rows_by_group: dict[str, list[int]]
    trained: list[str]
    holdout: list[str]

    def count(self, groups) -> int:
        """How many rows these groups have together."""
        return sum(len(self.rows_by_group[group]) for group in groups)

    def means(self, groups, value_N, counts_N) -> np.ndarray:
        """Mean value of each group over its rows that count; -inf where none does."""
        sizes = [len(self.rows_by_group[group]) for group in groups]
        rows = np.array(
            [row for g in groups for row in self.rows_by_group[g]], np.int64
        )
        of = np.repeat(np.arange(len(sizes)), sizes)[counts_N[rows]]
        rows = rows[counts_N[rows]]
        total = np.bincount(of, np.asarray(value_N, float)[rows], len(sizes))
        count = np.bincount(of, minlength=len(sizes))
        return np.where(count > 0, total / np.maximum(count, 1), -np.inf)


class Memorization(NamedTuple):
    """What an original has memorised, and how easy rows are for who never saw them.

    Both `[N]`, see `memory.py`.
    """

    score: np.ndarray
    easiness: np.ndarray


class Selection(NamedTuple):
    """Groups to forget, and those of the groups set apart that are their control."""

    forgotten: set[str]
    nonmembers: set[str]


def parse_rule(text: str) -> Rule:
    """The rule that a text says.

    Raises:
        UserError: it is none, or its share is none.
    """
    rule = Rule(*text.partition(":")[::2])
    if rule.kind not in KINDS or not rule.what:
        known = [f"{kind}:{what}" for kind, what in KINDS.items()]
        raise UserError(
            f"unlearn rule {text!r}: use {', '.join(known[:-1])} or {known[-1]}"
        )
    if KINDS[rule.kind] == "SHARE":
        try:
            share = rule.share
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            raise UserError(
                f"unlearn rule {rule}: the share must lie between 0 and 1, like 0.1"
            )
    return rule


def check_rule(text: str) -> None:
    """Refuses what is wrong with a rule whatever the data are.

    Raises:
        UserError: it is none, or its file cannot be read.
    """
    rule = parse_rule(text)
    if rule.kind == "ids":
        unlearn_names.read_ids(pathlib.Path(rule.what).expanduser())


def groups_by_name(data, rule: Rule, group_N) -> set[str]:
    """The groups that a rule names one by one; they are never set apart.

    Args:
        data: a `ccu_jax.data.Dataset`.
        rule: none of these for other kinds than `group` and `ids`.
        group_N: which rows are forgotten together.

    Raises:
        UserError: a name, a file or an id that cannot be.
    """
    if rule.kind not in _NAMED:
        return set()
    return {str(group) for group in group_N[_NAMED[rule.kind](data, rule.what)]}


def select_groups(
    data,
    rule: Rule,
    pool: TrainingGroups,
    listed: set[str],
    memory: Memorization | None,
) -> Selection:
    """What a rule forgets.

    Args:
        data: a `ccu_jax.data.Dataset`.
        rule: the rule.
        pool: of what.
        listed: of `named`.
        memory: of the original, for `memorised`.

    Raises:
        UserError: an unknown class.
    """
    if rule.kind not in _CHOICES:
        return Selection(listed, set(pool.holdout))
    if not pool.trained:
        return Selection(set(), set())
    return _CHOICES[rule.kind](data, rule, pool, memory)


def take_groups(groups, rows_of, count):
    """The first groups that together have at least `count` rows."""
    taken = 0
    for group in groups:
        if taken >= count:
            return
        taken += len(rows_of[group])
        yield group


def _take_fraction(rule, pool, groups) -> set[str]:
    """The first of these trained groups, up to the rule's share of all trained rows."""
    count = max(1, round(rule.share * pool.count(pool.trained)))
    return set(take_groups(groups, pool.rows_by_group, count))


def _random(data, rule, pool, memory) -> Selection:
    return Selection(_take_fraction(rule, pool, pool.trained), set(pool.holdout))


def _class(data, rule, pool, memory) -> Selection:
    """All groups with a row of the class, on both sides."""
    if rule.what not in data.classes:
        raise UserError(
            f"unlearn rule {rule}: no such class; there are {', '.join(data.classes)}"
        )
    has = data.labels[:, data.classes.index(rule.what)] > 0

    def of(groups):
        return {group for group in groups if has[pool.rows_by_group[group]].any()}

    return Selection(of(pool.trained), of(pool.holdout))


def _cluster(data, rule, pool, memory) -> Selection:
    """The groups most like the first one that has a picture; see `nearness.py`.

    The control are the groups set apart that are most like it, as large a share of the
    rows set apart, so that both lie equally near. Where that is fewer than LEAST rows
    the control reaches farther out than what is forgotten.
    """
    shown = [g for g in pool.trained if data.has_image[pool.rows_by_group[g]].any()]
    centre = (shown or pool.trained)[0]
    groups = [*pool.trained, *pool.holdout]
    rows = np.sort(
        np.array([r for g in groups for r in pool.rows_by_group[g]], np.int64)
    )
    near_N = np.zeros(len(data.id))
    near_N[rows] = nearness.similarity(data, rows, np.array(pool.rows_by_group[centre]))
    # Whatever else: the one that all are compared with.
    near_N[pool.rows_by_group[centre]] = np.inf
    every = np.ones(len(near_N), bool)

    def ranked(groups):
        return _ranked(groups, pool.means(groups, near_N, every))

    count = max(MIN_NONMEMBERS, round(rule.share * pool.count(pool.holdout)))
    control = take_groups(ranked(pool.holdout), pool.rows_by_group, count)
    return Selection(_take_fraction(rule, pool, ranked(pool.trained)), set(control))


def _memorised(data, rule, pool, memory) -> Selection:
    """The groups whose pictures the original has memorised most; see `memory.py`.

    These are harder than most for who never saw them. So the control are groups set
    apart that are as hard, each as near as can be to another quantile of the chosen; as
    large a share of those set apart, for there are no more of that kind, but some LEAST
    rows. What the original makes of a row no unseen row can match: compare an attack
    with the reference's.
    """
    if memory is None:
        raise ValueError("this rule needs the original's memory")

    def of(groups, value_N):
        means = pool.means(groups, value_N, data.has_image)
        return dict(zip(groups, means, strict=True))

    known = of(pool.trained, memory.score)
    shown = [group for group in pool.trained if np.isfinite(known[group])]
    ranked = _ranked(shown, np.array([known[group] for group in shown]))
    forgotten = _take_fraction(rule, pool, ranked)
    ease = of([*pool.trained, *pool.holdout], memory.easiness)
    offered = [group for group in pool.holdout if np.isfinite(ease[group])]
    each = max(1, pool.count(offered)) / max(1, len(offered))
    least = math.ceil(max(MIN_NONMEMBERS / each, rule.share * len(offered)))
    places = match_distribution(
        np.array([ease[group] for group in pool.trained if group in forgotten]),
        np.array([ease[group] for group in offered]),
        min(len(offered), least),
    )
    return Selection(forgotten, {offered[place] for place in places})


_CHOICES = {
    "random": _random,
    "class": _class,
    "cluster": _cluster,
    "memorised": _memorised,
}


def match_distribution(wanted, offered, count: int) -> list[int]:
    """Places of so many `offered` values that are spread like the `wanted` ones.

    For one quantile of `wanted` after the other, from the lowest, the nearest that is
    left.
    """
    if not len(wanted):
        return []
    places = np.argsort(offered, kind="stable").tolist()
    values, taken = np.asarray(offered)[places].tolist(), []
    steps = (np.arange(count) + 0.5) / max(count, 1)
    for aim in np.quantile(wanted, steps, method="inverted_cdf").tolist():
        at = bisect.bisect_left(values, aim)
        if at == len(values) or (at and aim - values[at - 1] <= values[at] - aim):
            at -= 1
        values.pop(at)
        taken.append(places.pop(at))
    return taken


def _ranked(groups, value) -> list[str]:
    """The groups with the highest value first, in seed order where it is the same."""
    return [groups[place] for place in np.argsort(-value, kind="stable")]
