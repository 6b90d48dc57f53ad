"""Scores and distances: right by other code, noticing what changed and nothing else."""

import functools
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
from sklearn import metrics

from ccu_jax.metrics import distances
from ccu_jax.metrics import ranking as scores
from ccu_jax.metrics.intervals import jackknife_interval

EXACT = 1e-9
BOTH = pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])


def said(seed=0, rows=80, classes=5):
    return np.random.default_rng(seed).normal(size=(rows, classes)).astype(np.float32)


def several(seed=0, rows=80, classes=5):
    labels = (np.random.default_rng(seed).random((rows, classes)) < 0.3).astype(float)
    labels[:, 3] = 0  # a class that no row has
    return labels


def embedded(seed=0, rows=150, classes=3, width=6):
    """Embeddings with classes in them, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.eye(classes)[rng.integers(classes, size=rows)]
    centres = 3 * rng.normal(size=(classes, width))
    return labels @ centres + rng.normal(size=(rows, width)), labels


# --- scores ---------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("seed", range(3))
def test_ranking_scores_are_those_of_scikit_learn(seed, ties):
    logits, labels = said(seed), several(seed)
    logits = np.round(2 * logits) if ties else logits
    there = labels.any(axis=0)
    truth, values = labels[:, there], logits[:, there]
    found = scores.mean_average_precision(logits, labels)
    assert found == pytest.approx(
        metrics.average_precision_score(truth, values, average="macro"), abs=EXACT
    )
    assert scores.macro_auroc(logits, labels) == pytest.approx(
        metrics.roc_auc_score(truth, values, average="macro"), abs=EXACT
    )


def test_ranking_scores_need_rows_that_differ():
    logits, labels = said(), several()
    for score in (scores.mean_average_precision, scores.macro_auroc):
        assert score(logits, 0 * labels) is None
        assert score(logits[:0], labels[:0]) is None
        assert score(np.nan * logits, labels) is None
    assert scores.macro_auroc(logits, 0 * labels + 1) is None
    assert scores.mean_average_precision(logits, 0 * labels + 1) == 1
    assert scores.mean_average_precision(0 * logits, labels) == pytest.approx(
        labels[:, labels.any(axis=0)].mean()
    )
    order = np.random.default_rng(1).permutation(len(logits))
    assert scores.mean_average_precision(logits[order], labels[order]) == pytest.approx(
        scores.mean_average_precision(logits, labels), abs=EXACT
    )


@BOTH
def test_scores_by_row_have_the_mean_of_scikit_learns(multi_label):
    logits = said()
    labels = several() if multi_label else np.eye(5)[said(1).argmax(1)]
    found = scores.row_scores(logits, labels, multi_label)
    if multi_label:
        expected = metrics.f1_score(
            labels, logits > 0, average="samples", zero_division=0
        )
    else:
        expected = metrics.accuracy_score(labels.argmax(1), logits.argmax(1))
    assert found.shape == (80,) and found.mean() == pytest.approx(expected, abs=EXACT)
    right = 9 * (2 * labels - 1)
    better = scores.score_difference(right, logits, labels, multi_label)
    worse = scores.score_difference(logits, right, labels, multi_label)
    assert better.low > 0 > worse.high
    assert better.value == pytest.approx(-worse.value)
    same = scores.score_difference(logits, logits, labels, multi_label)
    assert same.low < same.value == 0 < same.high < 0.05
    broken = logits * np.nan
    assert scores.score_difference(broken, logits, labels, multi_label) is None
    none = logits[:0], logits[:0], labels[:0]
    assert scores.score_difference(*none, multi_label) is None


def test_gap_and_tug_of_war_have_the_values_computed_by_hand():
    reference = {"unlearn": 0.6, "retain": 0.9, "test": 0.7, "attack": 0.5}
    model = {"unlearn": 0.8, "retain": 0.9, "test": 0.6, "attack": 0.6}
    assert scores.average_gap(model, reference) == pytest.approx(10)
    assert scores.tug_of_war(model, reference) == pytest.approx(0.8 * 1 * 0.9)
    found = scores.tug_of_war(model, reference, scores.TOW_ATTACK)
    assert found == pytest.approx(0.9 * 1 * 0.9)
    assert scores.average_gap(reference, reference) == 0
    assert scores.tug_of_war(reference, reference) == 1
    # Too low is as far as too high.
    lower = reference | {"unlearn": 0.4}
    higher = reference | {"unlearn": 0.8}
    for score in (scores.average_gap, scores.tug_of_war):
        assert score(lower, reference) == pytest.approx(score(higher, reference))
        assert score(reference | {"test": None}, reference) is None
    with pytest.raises(ValueError, match="same scores"):
        scores.average_gap({"test": 1.0}, reference)


# --- outputs --------------------------------------------------------------------------


def test_the_js_divergence_is_that_of_scipy():
    one, two = (x.astype(np.float64) for x in (said(0), said(1)))
    p, q = (scipy.special.softmax(x, axis=1) for x in (one, two))
    expected = scipy.spatial.distance.jensenshannon(p, q, axis=1, base=2) ** 2
    found = distances.js_divergence(one, two, False)
    np.testing.assert_allclose(found, expected, atol=EXACT)
    pairs = [scipy.special.expit(x) for x in (one, two)]
    pairs = [np.stack([x, 1 - x]) for x in pairs]
    expected = scipy.spatial.distance.jensenshannon(*pairs, axis=0, base=2) ** 2
    found = distances.js_divergence(one, two, True)
    np.testing.assert_allclose(found, expected.mean(axis=1), atol=EXACT)


@BOTH
def test_equal_outputs_are_no_distance_and_opposite_ones_all_of_it(multi_label):
    logits = 50 * np.sign(said())
    if not multi_label:
        logits = 50 * np.eye(5)[np.random.default_rng(0).integers(5, size=80)]
        opposite, most = np.roll(logits, 1, axis=1), math.sqrt(2)
    else:
        opposite, most = -logits, math.sqrt(5)
    given = logits, opposite, multi_label
    np.testing.assert_allclose(distances.js_divergence(*given), 1, atol=1e-9)
    np.testing.assert_allclose(distances.activation_distance(*given), most)
    assert not distances.agreement(*given).any()
    same = logits, logits, multi_label
    assert (distances.js_divergence(*same) < EXACT).all()
    assert not distances.activation_distance(*same).any()
    assert distances.agreement(*same).all()


@BOTH
def test_distances_of_outputs_notice_the_rows_that_changed_and_only_these(multi_label):
    logits = said()
    other = logits.copy()
    other[:8] += 3 * said(1)[:8]
    for distance in (distances.js_divergence, distances.activation_distance):
        found = distance(logits, other, multi_label)
        assert (found[:8] > 0.001).all() and (found[8:] < EXACT).all()
        assert found.shape == (80,)
        huge = distance(1e4 * logits, -1e4 * other, multi_label)
        assert np.isfinite(huge).all()
        one = distance(logits[:1], other[:1], multi_label)
        np.testing.assert_allclose(one, found[:1])
        back = distance(other, logits, multi_label)
        np.testing.assert_allclose(back, found)
    assert distances.agreement(logits, other, multi_label)[8:].all()
    assert distances.agreement(logits, other, multi_label)[:8].mean() < 1


# --- embeddings -----------------------------------------------------------------------


def hsic(x, y, unbiased):
    """By its definition, with kernels of all pairs of rows."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    if not unbiased:
        centre = np.eye(n) - 1 / n
        return np.trace(k @ centre @ m @ centre)
    k, m = (z - np.diag(np.diag(z)) for z in (k, m))
    one = np.ones(n)
    means = one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
    return np.trace(k @ m) + means - 2 / (n - 2) * one @ k @ m @ one


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_cka_is_that_of_its_definition(unbiased):
    x, _ = embedded(0, rows=40)
    y = np.tanh(x @ np.random.default_rng(1).normal(size=(6, 9))) + 5
    own = hsic(x, x, unbiased) * hsic(y, y, unbiased)
    expected = hsic(x, y, unbiased) / math.sqrt(own)
    found = distances.cka(x, y, unbiased=unbiased)
    assert found == pytest.approx(expected, abs=EXACT)
    assert distances.cka(y, x, unbiased=unbiased) == pytest.approx(expected, abs=EXACT)


def test_the_cka_is_one_for_what_was_turned_and_near_zero_for_what_is_foreign():
    x, _ = embedded()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    assert distances.cka(x, 3 * x @ turn - 7) == pytest.approx(1)
    some = x + np.random.default_rng(2).normal(size=x.shape)
    assert 0.5 < distances.cka(x, some) < 0.99
    wide, wider = np.random.default_rng(3).normal(size=(2, 60, 300))
    assert abs(distances.cka(wide, wider)) < 0.1
    assert distances.cka(wide, wider, unbiased=False) > 0.7  # which is why not
    for unbiased in (False, True):
        found = distances.cka_interval(x, some, unbiased=unbiased)
        cka = functools.partial(distances.cka, unbiased=unbiased)
        assert found == pytest.approx(jackknife_interval(cka, x, some), abs=EXACT)
        assert found.low < found.value < found.high < found.low + 0.3


def test_embeddings_that_fell_together_have_nothing_in_common_with_others():
    x, labels = embedded()
    same = np.ones_like(x) * 0.3 + 1e-9 * x
    assert distances.cka(x, same) == distances.cka(same, x) == 0
    assert distances.cka(same, same) is None
    assert distances.cka(x[:3], x[:3]) is None
    assert distances.cka(x * np.nan, x) is None
    assert (
        distances.cka_interval(x, same) is distances.cka_interval(x[:9], x[:9]) is None
    )
    assert distances.intra_class_similarity(x, same, labels).value == 0
    assert distances.intra_class_similarity(same, same, labels) is None
    assert distances.intra_class_similarity(x[:2], x[:2], labels[:2]) is None
    assert distances.scatter_ratio(same, labels) is None
    assert distances.scatter_ratio(x[:1], labels[:1]) is None
    assert np.isfinite(distances.cka(1e150 * x, 1e-150 * x))


def test_the_scatter_ratio_is_within_over_between():
    z = np.array([[0.0], [2], [10], [12]])
    labels = np.eye(2)[[0, 0, 1, 1]]
    assert distances.scatter_ratio(z, labels) == pytest.approx(4 / 100)
    assert distances.scatter_ratio(7 * z + 1, labels) == pytest.approx(4 / 100)
    # A row of both classes counts in both: means 2 / 3 and 8, of all 17 / 3.
    both = np.array([[1, 0], [1, 0], [1, 1], [0, 1]])
    z = np.array([[0.0], [0], [6], [10]])
    means, every = (2.0, 8.0), 22 / 5
    within = 2 * 2**2 + 4**2 + 2 * 2**2
    between = 3 * (means[0] - every) ** 2 + 2 * (means[1] - every) ** 2
    assert distances.scatter_ratio(z, both) == pytest.approx(within / between)


def test_the_scatter_ratio_notices_looser_classes():
    z, labels = embedded()
    centres = labels @ np.linalg.lstsq(labels, z, rcond=None)[0]
    loose = centres + 2 * (z - centres)
    ratio = distances.scatter_ratio(z, labels)
    assert distances.scatter_ratio(loose, labels) == pytest.approx(4 * ratio)


def test_within_class_structure_is_kept_by_a_turn_and_lost_by_a_shuffle():
    x, labels = embedded()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    kept = distances.intra_class_similarity(x, 2 * x @ turn + 1, labels)
    assert kept.value == pytest.approx(1)
    # Inside each class the rows change places: the classes stay where they are.
    rng = np.random.default_rng(2)
    place = np.arange(len(x))
    for name in range(3):
        rows = np.flatnonzero(labels[:, name])
        place[rows] = rng.permutation(rows)
    lost = distances.intra_class_similarity(x, x[place], labels)
    assert abs(lost.value) < 0.15
    same = distances.scatter_ratio(x, labels)
    assert distances.scatter_ratio(x[place], labels) == pytest.approx(same)
    some = distances.intra_class_similarity(x, x + rng.normal(size=x.shape), labels)
    assert 0.2 < some.value < 0.9


def test_within_class_similarity_is_the_mean_correlation_of_distances():
    x, labels = embedded(rows=40)
    y = np.tanh(x)
    expected = []
    for name in range(3):
        rows = labels[:, name] > 0
        pairs = (scipy.spatial.distance.pdist(z[rows]) for z in (x, y))
        expected.append(np.corrcoef(*pairs)[0, 1])
    found = distances.intra_class_similarity(x, y, labels)
    assert found.value == pytest.approx(np.mean(expected), abs=EXACT)


def test_the_order_of_rows_does_not_change_what_is_said_of_embeddings():
    x, labels = embedded(rows=300)
    y = x + np.random.default_rng(1).normal(size=x.shape)
    order = np.random.default_rng(2).permutation(len(x))
    for rows in (20, 200):  # of about 100 a class
        found, mixed = (
            distances.intra_class_similarity(x[o], y[o], labels[o], rows=rows).value
            for o in (slice(None), order)
        )
        assert found == pytest.approx(mixed, abs=EXACT)
    assert distances.cka(x[order], y[order]) == pytest.approx(distances.cka(x, y))
    ratios = [distances.scatter_ratio(x[o], labels[o]) for o in (slice(None), order)]
    assert ratios[0] == pytest.approx(ratios[1])
