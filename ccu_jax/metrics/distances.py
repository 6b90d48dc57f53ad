"""How far two models are from each other on the same rows: outputs and embeddings.

Those of outputs are one value for each row, for `intervals.mean_interval`; those of
embeddings are of all rows together, for `intervals.jackknife`.
"""

import math

import numpy as np
import scipy.special
from scipy.spatial.distance import pdist

from ccu_jax.metrics.intervals import (
    Interval,
    assign_folds,
    interval_from_replicates,
    mean_interval,
)


def js_divergence(logits, reference, multi_label: bool) -> np.ndarray:
    """Jensen-Shannon divergence of what two models predict, in bits, 0 to 1, `[N]`.

    Of the softmax, or the mean over labels of that of each label's two values.

    Args:
        logits: `[N, K]`.
        reference: `[N, K]`, another model's logits of the same rows.
        multi_label: whether rows have several labels.
    """
    log_p, log_q = (_log_distribution(x, multi_label) for x in (logits, reference))
    log_mean = np.logaddexp(log_p, log_q) - math.log(2)
    parts = [(np.exp(x) * (x - log_mean)).sum(axis=-1) for x in (log_p, log_q)]
    bits = np.clip(sum(parts) / (2 * math.log(2)), 0, 1)
    return bits.mean(axis=1) if multi_label else bits


def agreement(logits, reference, multi_label: bool) -> np.ndarray:
    """Whether two models say the same class, `[N]`; of labels, the share that agrees.

    Its mean is known as completeness (Cao & Yang 2015).
    """
    if multi_label:
        same = (np.asarray(logits) > 0) == (np.asarray(reference) > 0)
        return same.mean(axis=1)
    return (np.argmax(logits, axis=1) == np.argmax(reference, axis=1)).astype(float)


def activation_distance(logits, reference, multi_label: bool) -> np.ndarray:
    """The Euclidean distance of two models' probabilities `[N]` (Golatkar et al. 2020).

    At most the root of 2, or of the number of labels.
    """
    # Of labels those of "yes" alone: "no" has the same difference.
    p, q = (np.exp(_log_distribution(x, multi_label)) for x in (logits, reference))
    return np.linalg.norm((p - q)[..., 1] if multi_label else p - q, axis=1)


def cka(x, y, *, unbiased: bool = True) -> float | None:
    """Linear centred kernel alignment of embeddings `[N, D]` and `[N, E]`: 1 if alike.

    Kornblith et al. 2019; rotations and scale do not matter. The estimate of Song et
    al. 2012, which is 0 on average for embeddings that have nothing to do with each
    other, and so can be a little below; the usual, biased one is near 1 for any two
    embeddings with more dimensions than rows.

    Returns:
        0 where the rows of one of both are all the same, None where those of both are,
        there are fewer than 4, or a value is no number.
    """
    x, y = _comparable(x, y)
    if x is None or not x.any() or not y.any():
        return None if x is None or x.any() == y.any() else 0.0
    return _aligned([_sums(*pair) for pair in ((x, y), (x, x), (y, y))], unbiased)


def cka_interval(
    x,
    y,
    *,
    unbiased: bool = True,
    parts: int = 20,
    confidence: float = 0.95,
    seed: int = 0,
    groups=None,
) -> Interval | None:
    """`cka` with the interval of `intervals.jackknife`, in the time of one alone.

    None where that has none, or is 0 of rows that are all the same.
    """
    x, y = _comparable(x, y)
    if x is None or not x.any() or not y.any():
        return None
    part = assign_folds(len(x), parts, seed, groups)
    if part.max() + 1 < parts:
        return None
    pairs = (x, y), (x, x), (y, y)
    sums = [[_sums(a[part == p], b[part == p]) for p in range(parts)] for a, b in pairs]
    whole = [[sum(terms) for terms in zip(*each, strict=True)] for each in sums]
    without = [
        _aligned(
            [
                [every - one for every, one in zip(total, each[left], strict=True)]
                for total, each in zip(whole, sums, strict=True)
            ],
            unbiased,
        )
        for left in range(parts)
    ]
    return interval_from_replicates(_aligned(whole, unbiased), without, confidence)


def scatter_ratio(z, labels) -> float | None:
    """Scatter within classes over that between them, of embeddings `[N, D]`.

    Sum over classes of the squared distances of their rows from their mean, over that
    of the squared distances of these means from the mean of all, each for each row; a
    row with several labels counts in each. Lower: tighter classes. Beside
    `within_class_similarity` one of two readings of "intra-class structural stability",
    which is compared with the value of the original or the reference.

    Returns:
        None where classes do not differ at all.
    """
    z, labels = np.asarray(z, np.float64), np.asarray(labels, np.float64)
    often = labels.sum(axis=1)
    if not often.any() or not np.isfinite(z).all():
        return None
    z = _centred(z, often)
    count = labels.sum(axis=0)
    means = (labels.T @ z) / np.maximum(count, 1)[:, None]
    total = often @ (z**2).sum(axis=1)
    between = count @ (means**2).sum(axis=1)
    if between <= 1e-12 * total or not total:
        return None
    return float(max(total - between, 0) / between)


def intra_class_similarity(
    x, y, labels, *, rows: int = 200, seed: int = 0, confidence: float = 0.95
) -> Interval | None:
    """Whether two models place the rows of a class alike among themselves.

    For each class, the correlation (Pearson) over pairs of its rows of their distances
    in one embedding and in the other; the mean over classes, with the t-interval over
    these. It is our reading of "intra-class structural stability", which has no
    published formula: 1 where what a class looks like inside was kept, whatever was
    turned or scaled, 0 where nothing of it was.

    Args:
        x: `[N, D]` embeddings of one model.
        y: `[N, E]` embeddings of another of the same rows.
        labels: `[N, K]`.
        rows: of a class that are looked at, at most.
        seed: of which these are.
        confidence: of the interval.

    Returns:
        None where no class has three rows that differ.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        return None
    found = []
    for name in range(labels.shape[1]):
        chosen = np.flatnonzero(labels[:, name] > 0)
        if len(chosen) > rows:
            # Sorted by content first: which are drawn must not depend on their order.
            chosen = chosen[np.lexsort(x[chosen, :2].T)]
            rng = np.random.default_rng([seed, name])
            chosen = rng.choice(chosen, size=rows, replace=False)
        if len(chosen) >= 3:
            found.append(_correlation(*(pdist(_centred(z[chosen])) for z in (x, y))))
    found = [value for value in found if value is not None]
    return mean_interval(found, bounds=(-1, 1), confidence=confidence)


def _log_distribution(logits, multi_label: bool):
    """Log-probabilities: `[N, K]`, of several labels `[N, K, 2]` of no and yes."""
    logits = np.asarray(logits, np.float64)
    if multi_label:
        signed = np.stack([-logits, logits], axis=-1)
        return -np.logaddexp(0, -signed)
    return scipy.special.log_softmax(logits, axis=1)


def _centred(z, weight=None):
    """Less its mean; zero where rows differ by no more than single precision does."""
    apart = z - np.average(z, axis=0, weights=weight)
    same = np.abs(apart).max(initial=0) <= 1e-6 * np.abs(z).max(initial=0)
    return np.zeros_like(z) if same else apart


def _unit(z):
    """Scaled to length 1, or zero."""
    largest = np.abs(z).max(initial=0)
    return z / np.linalg.norm(z / largest) / largest if largest > 0 else z


def _comparable(x, y):
    """Both centred and of length 1, or (None, None) where they cannot be compared."""
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    if len(x) < 4 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None, None
    return tuple(_unit(_centred(z)) for z in (x, y))


def _sums(x, y):
    """All that `_hsic` needs of rows, which adds up over groups of rows."""
    own_x, own_y = (x**2).sum(axis=1), (y**2).sum(axis=1)
    sums = x.sum(axis=0), y.sum(axis=0), own_x.sum(), own_y.sum()
    return len(x), *sums, x.T @ y, x.T @ own_y, y.T @ own_x, own_x @ own_y


def _hsic(sums, unbiased: bool):
    """HSIC of linear kernels without any `[N, N]` matrix, up to a factor for all N.

    The unbiased one is HSIC_1 of Song et al. 2012, with kernels whose diagonal is zero.
    """
    count, x, y, own_x, own_y, xy, x_own, y_own, own = sums
    if not unbiased:
        return ((xy - np.outer(x, y) / count) ** 2).sum()
    trace = (xy**2).sum() - own
    means = (x @ x - own_x) * (y @ y - own_y) / ((count - 1) * (count - 2))
    by_row = x @ xy @ y - x @ x_own - y @ y_own + own
    return trace + means - 2 / (count - 2) * by_row


def _aligned(sums, unbiased: bool) -> float | None:
    """The CKA of the sums of both, of the first and of the second alone."""
    both, first, second = (_hsic(s, unbiased) for s in sums)
    return float(both / math.sqrt(first * second)) if first * second > 0 else None


def _correlation(a, b) -> float | None:
    """Pearson's; 0 where one of both is constant, None where both are."""
    a, b = (_unit(_centred(x)) for x in (a, b))
    if not a.any() and not b.any():
        return None
    return float(a @ b)
