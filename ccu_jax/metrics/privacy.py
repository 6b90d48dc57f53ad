"""Lower bounds, with a confidence, of how much a model tells of who was unlearned.

An (epsilon, delta) bounds how much surer anybody can be, who sees the model, that a
row was trained on and unlearned rather than never seen. Audits give what it is *at
least*: a small value is no proof that nothing leaks, for a better attack may find more.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from ccu_jax.metrics.intervals import clopper_pearson

# What is above is not told apart.
MAX_EPSILON = 50.0
# Fewer guesses than this never tell much, and each number of guesses that is tried
# costs all others some confidence.
_FEWEST = 8


class OneRunAudit(NamedTuple):
    """A lower bound of epsilon, and the guesses that gave it.

    `over_forgotten`: the included rows were those with the lower scores. `tried`: how
    many ways of guessing share the confidence.
    """

    epsilon: float
    correct: int
    guesses: int
    canaries: int
    delta: float
    confidence: float
    over_forgotten: bool
    tried: int


def one_run_p_value(
    correct: int, guesses: int, canaries: int, epsilon: float, delta: float
) -> float:
    """The chance of so many correct guesses, at most, if (epsilon, delta) held.

    Steinke, Nasr & Jagielski 2023 (arXiv 2305.08846), with B ~ Bin(guesses, 1 / (1 +
    e^-epsilon)): P[B >= correct] + 2 canaries delta max_i P[correct - i <= B < correct]
    / i.
    """
    binomial = scipy.stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = binomial.sf(correct - 1)
    i = np.arange(1, correct + 1)
    # Sums of single terms: differences of tails near 1 would be lost in rounding.
    below = np.cumsum(binomial.pmf(correct - i))
    more = (below / i).max(initial=0.0)
    return float(min(tail + 2 * canaries * delta * more, 1.0))


def one_run_epsilon(
    correct: int,
    guesses: int,
    canaries: int,
    delta: float = 1e-5,
    confidence: float = 0.95,
) -> float:
    """The largest epsilon that so many correct guesses refute, 0 to 50.

    Args:
        correct: guesses that were right.
        guesses: rows of which it was guessed whether they were included.
        canaries: all rows that were included or not, by an independent fair coin each.
        delta: of (epsilon, delta).
        confidence: of the bound.

    Raises:
        ValueError: where not 0 <= correct <= guesses <= canaries.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            "needs 0 <= correct <= guesses <= canaries, not "
            f"{correct}, {guesses}, {canaries}"
        )

    def refuted(epsilon):
        return one_run_p_value(correct, guesses, canaries, epsilon, delta) < (
            1 - confidence
        )

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < MAX_EPSILON and refuted(high):
        low, high = high, 2 * high
    high = min(high, MAX_EPSILON)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def one_run_audit(
    scores,
    included,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    guesses: Sequence[int] | None = None,
    seed: int = 0,
) -> OneRunAudit:
    """One-run audit of scores of canaries, each included by a fair coin.

    Half of the guesses are "included", of the highest scores, half are "not", of the
    lowest; and the other way round, for rows that are conspicuously bad were unlearned
    too. The best of all these ways counts, with the confidence shared among them
    (Bonferroni).

    Args:
        scores: `[M]`, such as a signal, or a signal minus a reference model's.
        included: `[M]`, which rows were trained on and then unlearned.
        delta: of (epsilon, delta).
        confidence: of the bound.
        guesses: numbers of guesses to try, to be chosen without a look at the data;
            None: all rows, half of them, a quarter, and so on.
        seed: of the order of rows with the same score.

    Raises:
        ValueError: where a score is no number, there is none, or there are more guesses
            than canaries.
    """
    scores, included = np.asarray(scores, np.float64), np.asarray(included, bool)
    if not np.isfinite(scores).all():
        raise ValueError("a score is no number: there is nothing to be guessed from it")
    count = len(scores)
    if not count or not all(1 <= number <= count for number in guesses or (1,)):
        raise ValueError(f"{count} canaries: {guesses} guesses cannot be made")
    if guesses is None:
        halvings = range(max(count // _FEWEST, 1).bit_length())
        guesses = [max(count >> times, 1) for times in halvings]
    right = _right_guesses(scores, included, seed)
    tried = 2 * len(guesses)
    best = OneRunAudit(0.0, 0, 0, count, delta, confidence, False, tried)
    for number in guesses:
        hits = int(right[0][number // 2] + right[1][number - number // 2])
        for correct, over in ((hits, False), (number - hits, True)):
            level = 1 - (1 - confidence) / tried
            epsilon = one_run_epsilon(correct, number, count, delta, level)
            if epsilon > best.epsilon or not best.guesses:
                told = epsilon, correct, number, count, delta, confidence, over, tried
                best = OneRunAudit(*told)
    return best


def _right_guesses(scores, included, seed):
    """How many of the i lowest are not included, of the i highest are, i = 0..M."""
    # Equal scores must not be told apart by where they stand, members first, say.
    mixed = np.random.default_rng(seed).permutation(len(scores))
    order = mixed[np.argsort(scores[mixed], kind="stable")]
    sides = ~included[order], included[order[::-1]]
    return [np.concatenate([[0], np.cumsum(side)]) for side in sides]


def clopper_pearson_epsilon(
    true_positives: int,
    members: int,
    false_positives: int,
    others: int,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
) -> float:
    """The epsilon that an attack with these rates refutes, 0 to 50.

    max(ln((1 - delta - FPR) / FNR), ln((1 - delta - FNR) / FPR)) with the upper ends of
    the rates' Clopper-Pearson intervals (Nasr et al. 2021), each at half the error.

    Args:
        true_positives: of `members`, those taken for members.
        members: rows that were unlearned.
        false_positives: of `others`, those taken for members.
        others: rows never seen.
        delta: of (epsilon, delta).
        confidence: of the bound.

    Raises:
        ValueError: where there are no members or no others.
    """
    if members < 1 or others < 1:
        raise ValueError(f"needs members and others, not {members} and {others}")
    fnr = clopper_pearson(members - true_positives, members, confidence).high
    fpr = clopper_pearson(false_positives, others, confidence).high
    found = [
        math.log((1 - delta - this) / that)
        for this, that in ((fpr, fnr), (fnr, fpr))
        if 1 - delta - this > 0
    ]
    return float(min(max([0.0, *found]), MAX_EPSILON))


def threshold_epsilon(
    members,
    others,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    seed: int = 0,
    groups=(None, None),
) -> float | None:
    """The epsilon that the best threshold of a signal refutes.

    The threshold, and on which side of it members are, are chosen on half of the rows,
    drawn by `seed`; the bound is of the other half, so that the choice costs nothing.

    Args:
        members: `[N]` signals of unlearned rows.
        others: `[M]` signals of rows never seen.
        delta: of (epsilon, delta).
        confidence: of the bound.
        seed: of the halves.
        groups: `[N]` and `[M]`, of rows that go together: one of each group is asked.

    Returns:
        None where there are fewer than two members or others, or a value is no number.
    """
    rng = np.random.default_rng(seed)
    sides = [np.asarray(x, np.float64) for x in (members, others)]
    sides = [
        np.sort(x if of is None else _one_of_each(x, of, rng))
        for x, of in zip(sides, groups, strict=True)
    ]
    if any(len(x) < 2 or not np.isfinite(x).all() for x in sides):
        return None
    first = [np.zeros(len(x), bool) for x in sides]
    for chosen in first:
        chosen[rng.permutation(len(chosen))[: len(chosen) // 2]] = True
    (m, o), (m_left, o_left) = (
        [x[mask] for x, mask in zip(sides, masks, strict=True)]
        for masks in (first, [~mask for mask in first])
    )

    def bound(sign, threshold, m, o):
        counts = [int((sign * x > sign * threshold).sum()) for x in (m, o)]
        return clopper_pearson_epsilon(
            *(counts[0], len(m), counts[1], len(o)), delta=delta, confidence=confidence
        )

    # Quantiles, closer to each other towards both ends, where few rows are.
    tails = 0.5 ** np.arange(1, max(int(math.log2(len(m) + len(o))), 2))
    cuts = np.unique(np.quantile(np.concatenate([m, o]), [*tails, *(1 - tails)]))
    ways = [(bound(sign, cut, m, o), sign, cut) for sign in (1, -1) for cut in cuts]
    _, sign, cut = max(ways)
    return bound(sign, cut, m_left, o_left)


def _one_of_each(values, groups, rng):
    """A row of each group, by chance: these are independent of each other."""
    # By value first: which are drawn must not depend on their order.
    order = np.lexsort((values, groups))
    mixed = order[rng.permutation(len(order))]
    _, first = np.unique(np.asarray(groups)[mixed], return_index=True)
    return values[mixed][first]
