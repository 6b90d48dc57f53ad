"""Forgetting scores and KLOM have the values computed by hand."""

import math

import numpy as np
import pytest

from ccu_jax.metrics.forgetting import (
    epsilon_by_row,
    final_score,
    forgetting_points_by_row,
    forgetting_score,
    klom,
    klom_by_row,
)
from ccu_jax.metrics.intervals import mean_interval, quantile_interval
from tests.metrics.samples import require


def test_epsilon_by_row_has_the_values_computed_by_hand():
    # Unlearned 1 2 3 4 above retrained 0 1.5 2.5 -1: between 1.5 and 2 each side has
    # one model on the wrong side; between 2.5 and 3 FNR is 2 / 4 and FPR is 0, which
    # does not count.
    unlearned = np.array([[1, 2, 3, 4]], float).T
    retrained = np.array([[0, 1.5, 2.5, -1]], float).T
    expected = pytest.approx([math.log((1 - 1e-5 - 0.25) / 0.25)], abs=1e-12)
    assert epsilon_by_row(unlearned, retrained) == expected
    assert epsilon_by_row(retrained, unlearned) == expected
    assert epsilon_by_row(unlearned + 9, retrained) == [50]  # separated
    assert epsilon_by_row(0.001 * unlearned, retrained) == [50]  # a narrow range
    assert epsilon_by_row(0 * unlearned, 0 * retrained) == [0]


def test_forgetting_points_halve_with_each_half_of_epsilon():
    epsilons = np.array([0, 0.49, 0.5, 1.2, 2.99, 3.0, 50])
    # ln 16 = 2.77: from 3 on there are no points.
    points = forgetting_points_by_row(epsilons, models=17)
    np.testing.assert_allclose(points, [1, 1, 0.5, 0.25, 1 / 32, 0, 0])


@pytest.mark.parametrize(
    "models, same, shifted", [(16, 0.32, 0.114), (128, 0.34, 0.031), (512, 0.36, 0.016)]
)
def test_forgetting_score_is_far_from_one_even_for_the_control(models, same, shifted):
    # Expected values were computed with other code on 1,000 rows.
    pools = np.random.default_rng(0).normal(size=(3, models, 300))
    scores = forgetting_score(pools[0] + 1, *pools[1:])
    assert scores.models == models
    of_control = require(scores.control)
    assert of_control.low - 0.02 < same < of_control.high + 0.02
    assert require(scores.score).value == pytest.approx(shifted, abs=0.015)


def test_final_score_is_the_product_of_the_competition():
    assert final_score(0.4, (0.9, 1.0), (0.6, 0.8)) == pytest.approx(0.27)
    assert final_score(0.4, (0.9, 0.0), (0.6, 0.8)) is None
    assert final_score(0.5, (np.nan, 0.5), (0.5, 0.5)) is None


def test_klom_has_the_value_computed_by_hand():
    # In the two outer of 20 bins: 3/4 and 1/4 of the unlearned, 1/4 and 3/4 of the
    # retrained models.
    unlearned = np.array([[0, 0.01, 0.02, 1]]).T
    retrained = np.array([[0, 0.99, 0.98, 0.97]]).T
    expected = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    assert klom_by_row(unlearned, retrained) == pytest.approx([expected])
    assert klom_by_row(unlearned, unlearned) == pytest.approx([0])
    # Disjoint: retrained models have the least probability in each bin.
    assert klom_by_row(unlearned, retrained + 90) > 5
    # Margins are clipped to 100.
    assert klom_by_row(unlearned + 200, unlearned + 300) == pytest.approx([0])


def test_klom_of_a_split_is_the_mean_or_a_quantile_over_rows():
    unlearned, retrained, control = np.random.default_rng(0).normal(size=(3, 100, 300))
    by_row = klom_by_row(unlearned + 1, retrained)
    scores = klom(unlearned + 1, retrained, control)
    assert scores.score == mean_interval(by_row)
    assert require(scores.score).low > 1.5 * require(scores.control).high
    quantile = klom(unlearned + 1, retrained, control, quantile=0.95)
    assert quantile.score == quantile_interval(by_row, 0.95)


@pytest.mark.parametrize("score", [forgetting_score, klom])
def test_scores_need_equal_numbers_of_models_and_finite_signals(score):
    pools = np.random.default_rng(0).normal(size=(3, 4, 10))
    with pytest.raises(ValueError, match="must have the same shape"):
        score(pools[0], pools[1][:3], pools[2])
    for extreme in (1e6 * pools, 0 * pools):
        for interval in score(*extreme)[:2]:
            assert np.isfinite(require(interval)).all()
    nan = np.full_like(pools[0], np.nan)
    assert score(nan, pools[1], pools[2]).score is None
    assert score(pools[0], pools[1], nan).control is None


def test_smallest_numbers_of_models_and_rows():
    pools = np.random.default_rng(0).normal(size=(3, 3, 1))
    assert require(forgetting_score(*pools).score).high <= 1
    assert klom(*pools).score is None  # no bounds, no interval
    with pytest.raises(ValueError, match="at least 3 models, got"):
        forgetting_score(*pools[:, :2])
