"""Lower confidence bounds on epsilon, the privacy parameter of an unlearned model.

(epsilon, delta) limits how well any attack separates rows that were trained on and then
unlearned from rows that were never seen. Audits bound epsilon from below: a small value
does not show that nothing leaks, because a better attack may find more.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats

from ccu_jax.metrics.intervals import Values, clopper_pearson
from ccu_jax.metrics.roc import Signals

MAX_EPSILON = 50.0  # bounds are clipped to it
_DELTA = 1e-5
# Fewer guesses rarely bound anything, and each number of guesses that is tried takes
# its share of the error probability.
_MIN_GUESSES = 8


class OneRunAudit(NamedTuple):
    """The result of `one_run_audit`: a lower bound on epsilon and its evidence."""

    epsilon: float
    correct: int  # number of correct guesses
    guesses: int  # number of guesses
    canaries: int  # number of rows, each included with probability 1/2
    delta: float
    confidence: float
    over_forgotten: bool  # whether rows with low scores were guessed to be included
    tried: int  # number of guessing strategies among which the error is divided


def one_run_epsilon(
    correct: int,
    guesses: int,
    canaries: int,
    delta: float = _DELTA,
    confidence: float = 0.95,
) -> float:
    """Returns a lower confidence bound on epsilon from one-run auditing, in [0, 50].

    It is the largest epsilon that the number of correct guesses rejects, by the test of
    Steinke, Nasr & Jagielski 2023 (arXiv 2305.08846): with B ~ Bin(guesses, 1 / (1 +
    e^-epsilon)), p = P[B >= correct] + 2 canaries delta max_i P[correct - i <= B <
    correct] / i. Of the canaries, each included in training by a fair coin, `guesses`
    are guessed to be included or not.

    Raises:
        ValueError: not 0 <= correct <= guesses <= canaries.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            "expected 0 <= correct <= guesses <= canaries, got "
            f"{correct=}, {guesses=}, {canaries=}"
        )

    def is_rejected(epsilon):
        rate = 1 / (1 + math.exp(-epsilon))
        tail = scipy.stats.binom.sf(correct - 1, guesses, rate)
        i = np.arange(1, correct + 1)
        # Summed term by term: differences of tails near 1 would be lost in rounding.
        below = np.cumsum(scipy.stats.binom.pmf(correct - i, guesses, rate))
        excess = (below / i).max(initial=0.0)
        return tail + 2 * canaries * delta * excess < 1 - confidence

    if not is_rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < MAX_EPSILON and is_rejected(high):
        low, high = high, 2 * high
    high = min(high, MAX_EPSILON)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if is_rejected(middle) else (low, middle)
    return low


def one_run_audit(
    scores: Values, included: Values, confidence: float = 0.95
) -> OneRunAudit:
    """Returns the best lower confidence bound on epsilon from one model's canaries.

    The highest scores are guessed to be of included canaries and equally many of the
    lowest to be of others, or the reverse, because unlearned rows may have unusually
    low scores. Guesses cover all canaries, half, a quarter, and so on; the best bound
    is returned, with the error probability divided among all these strategies
    (Bonferroni). `scores` `[M]` are, for example, a signal minus that of a reference
    model; `included` `[M]` is True for rows that were trained on and then unlearned.

    Raises:
        ValueError: there is no score or a score is not finite.
    """
    scores, included = np.asarray(scores, np.float64), np.asarray(included, bool)
    count = len(scores)
    if not count or not np.isfinite(scores).all():
        raise ValueError("scores: must be non-empty and finite")
    lowest, highest = _count_correct(scores, included)
    strategies = []
    for halvings in range(max(count // _MIN_GUESSES, 1).bit_length()):
        guesses = max(count >> halvings, 1)
        hits = int(lowest[guesses // 2] + highest[guesses - guesses // 2])
        strategies += [(hits, guesses, False), (guesses - hits, guesses, True)]
    tried = len(strategies)
    level = 1 - (1 - confidence) / tried

    def audit(correct, guesses, is_reversed):
        epsilon = one_run_epsilon(correct, guesses, count, _DELTA, level)
        counts = correct, guesses, count
        return OneRunAudit(epsilon, *counts, _DELTA, confidence, is_reversed, tried)

    return max((audit(*x) for x in strategies), key=lambda audit: audit.epsilon)


def _count_correct(scores, included) -> tuple[np.ndarray, np.ndarray]:
    """Counts correct guesses on the i lowest and i highest scores, each `[M + 1]`.

    Tied scores are in random order, so that the order of the rows does not matter.
    """
    mixed = np.random.default_rng(0).permutation(len(scores))
    order = mixed[np.argsort(scores[mixed], kind="stable")]
    lowest, highest = ~included[order], included[order[::-1]]
    return np.append(0, np.cumsum(lowest)), np.append(0, np.cumsum(highest))


def clopper_pearson_epsilon(
    true_positives: int,
    members: int,
    false_positives: int,
    nonmembers: int,
    confidence: float = 0.95,
) -> float:
    """Returns a Clopper-Pearson lower confidence bound on epsilon, clipped to [0, 50].

    max(ln((1 - delta - FPR) / FNR), ln((1 - delta - FNR) / FPR)) at the upper limits of
    the rates' Clopper-Pearson intervals (Nasr et al. 2021), each at half the error.

    Raises:
        ValueError: there are no members or no non-members.
    """
    if members < 1 or nonmembers < 1:
        raise ValueError(f"counts must be positive, got {members=}, {nonmembers=}")
    misses = clopper_pearson(members - true_positives, members, confidence)
    alarms = clopper_pearson(false_positives, nonmembers, confidence)
    assert misses is not None and alarms is not None
    rates = (alarms.high, misses.high), (misses.high, alarms.high)
    bounds = [math.log((1 - _DELTA - a) / b) for a, b in rates if 1 - _DELTA - a > 0]
    return float(min(max([0.0, *bounds]), MAX_EPSILON))


def threshold_epsilon(signals: Signals, confidence: float = 0.95) -> float | None:
    """Returns a lower confidence bound on epsilon from the best threshold on a signal.

    The threshold, and the side of it on which members are expected, are chosen on a
    random half of the rows; the other half gives the bound. One random row of each
    group is used. None if a side has fewer than two rows or a value is not finite.
    """
    rng = np.random.default_rng(0)
    sides = [np.asarray(x, np.float64) for x in signals[:2]]
    sides = [
        np.sort(x if ids is None else _sample_one_per_group(x, ids, rng))
        for x, ids in zip(sides, signals.groups, strict=True)
    ]
    if any(len(x) < 2 or not np.isfinite(x).all() for x in sides):
        return None
    halves = []
    for x in sides:
        is_chosen = np.zeros(len(x), bool)
        is_chosen[rng.permutation(len(x))[: len(x) // 2]] = True
        halves.append((x[is_chosen], x[~is_chosen]))
    (m, m_held_out), (n, n_held_out) = halves

    def bound(sign, threshold, m, n):
        hits, alarms = (int((sign * x > sign * threshold).sum()) for x in (m, n))
        return clopper_pearson_epsilon(hits, len(m), alarms, len(n), confidence)

    # Quantiles, denser toward both ends, where there are few rows.
    tails = 0.5 ** np.arange(1, max(int(math.log2(len(m) + len(n))), 2))
    cuts = np.unique(np.quantile(np.concatenate([m, n]), [*tails, *(1 - tails)]))
    _, sign, cut = max((bound(s, c, m, n), s, c) for s in (1, -1) for c in cuts)
    return bound(sign, cut, m_held_out, n_held_out)


def _sample_one_per_group(values, groups, rng) -> np.ndarray:
    """Samples one value of each group."""
    # Sorted by value, so that the choice does not depend on the order of the rows.
    order = np.lexsort((values, groups))
    mixed = order[rng.permutation(len(order))]
    _, first = np.unique(np.asarray(groups)[mixed], return_index=True)
    return values[mixed][first]
