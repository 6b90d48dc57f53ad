"""Distances between the predictions or embeddings of two models on the same rows.

Distances of predictions are computed from the logits `[N, K]` of both models and have
one value for each row; with `multi_label` rows have several labels. Distances of
embeddings, `[N, D]` and `[N, E]`, have one value for all rows together.
"""

import math

import numpy as np
from scipy.spatial.distance import pdist

from ccu_jax.metrics.intervals import (
    Groups,
    Interval,
    assign_folds,
    interval_from_replicates,
    mean_interval,
)
from ccu_jax.metrics.membership import log_distribution

_NUM_FOLDS = 20
_MAX_ROWS_PER_CLASS = 200  # the number of distances grows with its square


def js_divergence(
    logits: np.ndarray, reference: np.ndarray, multi_label: bool
) -> np.ndarray:
    """Returns the Jensen-Shannon divergence of predictions, `[N]`, in [0, 1] bit.

    Single-label: of the softmax. Multi-label: averaged over the binary predictions.
    """
    log_p, log_q = (log_distribution(x, multi_label) for x in (logits, reference))
    log_mean = np.logaddexp(log_p, log_q) - math.log(2)
    p, q = ((np.exp(x) * (x - log_mean)).sum(axis=-1) for x in (log_p, log_q))
    bits = np.clip((p + q) / (2 * math.log(2)), 0, 1)
    return bits.mean(axis=1) if multi_label else bits


def agreement(
    logits: np.ndarray, reference: np.ndarray, multi_label: bool
) -> np.ndarray:
    """Returns whether predicted classes agree, or the fraction of labels that agree.

    The result is `[N]`, 0 to 1. Its mean is known as completeness (Cao & Yang 2015).
    """
    if multi_label:
        same = (np.asarray(logits) > 0) == (np.asarray(reference) > 0)
        return same.mean(axis=1)
    return (np.argmax(logits, axis=1) == np.argmax(reference, axis=1)).astype(float)


def activation_distance(
    logits: np.ndarray, reference: np.ndarray, multi_label: bool
) -> np.ndarray:
    """Returns the L2 distance between probabilities, `[N]` (Golatkar et al. 2020).

    At most sqrt(2), or sqrt(K) for several labels.
    """
    p, q = (np.exp(log_distribution(x, multi_label)) for x in (logits, reference))
    # The probabilities of "no" and of "yes" differ by the same amount.
    return np.linalg.norm((p - q)[..., 1] if multi_label else p - q, axis=1)


def cka_interval(
    x: np.ndarray, y: np.ndarray, *, groups: Groups = None
) -> Interval | None:
    """Returns linear centered kernel alignment (CKA) with its 95 % jackknife interval.

    1 for embeddings equal up to rotation and scale (Kornblith et al. 2019). The
    estimate is the unbiased one of Song et al. 2012, which is 0 on average for
    unrelated embeddings and so may be negative; the biased one is near 1 for any two
    embeddings with more dimensions than rows. None if all rows of x or of y are equal,
    a value is not finite, or there are fewer than 20 rows or groups.
    """
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    if len(x) < _NUM_FOLDS or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    x, y = _normalize(_center(x)), _normalize(_center(y))
    fold = assign_folds(len(x), _NUM_FOLDS, groups)
    if not x.any() or not y.any() or fold.max() + 1 < _NUM_FOLDS:
        return None
    pairs = (x, y), (x, x), (y, y)
    # HSIC is a function of sums over rows, so leaving out a fold subtracts its sums.
    sums = [
        [_hsic_sums(a[fold == k], b[fold == k]) for a, b in pairs]
        for k in range(_NUM_FOLDS)
    ]
    totals = [sum(fold_sums) for fold_sums in zip(*sums, strict=True)]
    replicates = [
        _cka([total - part for total, part in zip(totals, pair_sums, strict=True)])
        for pair_sums in sums
    ]
    return interval_from_replicates(_cka(totals), replicates)


def scatter_ratio(z: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the ratio of within-class to between-class scatter of embeddings.

    Within: the squared distances of rows from their class mean. Between: the squared
    distances of class means from the overall mean, weighted by the number of rows. A
    row counts in each of its classes `[N, K]`. None if all class means are equal.
    """
    z, labels = np.asarray(z, np.float64), np.asarray(labels, np.float64)
    num_labels = labels.sum(axis=1)
    if not num_labels.any() or not np.isfinite(z).all():
        return None
    z = _center(z, num_labels)
    count = labels.sum(axis=0)
    means = (labels.T @ z) / np.maximum(count, 1)[:, None]
    total = num_labels @ (z**2).sum(axis=1)
    between = count @ (means**2).sum(axis=1)
    if between <= 1e-12 * total or not total:
        return None
    return float(max(total - between, 0) / between)


def intra_class_similarity(
    x: np.ndarray, y: np.ndarray, labels: np.ndarray
) -> Interval | None:
    """Returns the mean correlation of within-class distances in two embeddings.

    For each class of the labels `[N, K]`, the Pearson correlation over pairs of its
    rows of their distances in x and in y; then the mean over classes with its
    t-interval. 1 if the classes have the same structure up to rotation and scale.
    This is our reading of "intra-class structural stability", for which no formula was
    published. None if no class has three distinct rows.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        return None
    correlations = []
    for k in range(labels.shape[1]):
        rows = np.flatnonzero(labels[:, k] > 0)
        if len(rows) > _MAX_ROWS_PER_CLASS:
            # Sorted by content, so that the sample does not depend on the row order.
            rows = rows[np.lexsort(x[rows, :2].T)]
            rng = np.random.default_rng([0, k])
            rows = rng.choice(rows, size=_MAX_ROWS_PER_CLASS, replace=False)
        if len(rows) >= 3:
            distances = (pdist(_center(z[rows])) for z in (x, y))
            if (correlation := _correlation(*distances)) is not None:
                correlations.append(correlation)
    return mean_interval(correlations, bounds=(-1, 1))


def _center(z, weights=None):
    """Subtracts the weighted mean; returns zeros if rows differ only by rounding."""
    centered = z - np.average(z, axis=0, weights=weights)
    is_constant = np.abs(centered).max(initial=0) <= 1e-6 * np.abs(z).max(initial=0)
    return np.zeros_like(z) if is_constant else centered


def _normalize(z):
    """Scales an array to unit norm without overflow; an array of zeros is unchanged."""
    largest = np.abs(z).max(initial=0)
    return z / np.linalg.norm(z / largest) / largest if largest > 0 else z


def _hsic_sums(x, y) -> np.ndarray:
    """Returns the sums over rows that `_hsic` needs, as an object array."""
    xx, yy = (x**2).sum(axis=1), (y**2).sum(axis=1)
    sums = x.sum(axis=0), y.sum(axis=0), xx.sum(), yy.sum()
    return np.array([len(x), *sums, x.T @ y, x.T @ yy, y.T @ xx, xx @ yy], object)


def _hsic(sums):
    """Returns HSIC_1 of Song et al. 2012 for linear kernels, times N (N - 3)."""
    count, x, y, xx, yy, xy, x_yy, y_xx, xx_yy = sums
    trace = (xy**2).sum() - xx_yy
    means = (x @ x - xx) * (y @ y - yy) / ((count - 1) * (count - 2))
    by_row = x @ xy @ y - x @ x_yy - y @ y_xx + xx_yy
    return trace + means - 2 / (count - 2) * by_row


def _cka(sums) -> float | None:
    """Returns linear CKA from the `_hsic_sums` of (x, y), (x, x) and (y, y).

    None if x or y is constant.
    """
    xy, xx, yy = map(_hsic, sums)
    return float(xy / math.sqrt(xx * yy)) if xx * yy > 0 else None


def _correlation(a, b) -> float | None:
    """Returns the Pearson correlation: 0 if one input is constant, None if both are."""
    a, b = (_normalize(_center(x)) for x in (a, b))
    if not a.any() and not b.any():
        return None
    return float(a @ b)
