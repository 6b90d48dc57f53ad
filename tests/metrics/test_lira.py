"""Attacks with shadow models find what attacks on single models miss."""

import numpy as np
import pytest
import scipy.stats

from ccu_jax.metrics import lira
from ccu_jax.metrics.roc import Signals, auc_interval
from tests.metrics.samples import EXACT, require


def pool(seed=0, models=16, rows=400, effect=0.0, neither=False):
    """Returns signals `[K, N]` of rows of very different difficulty, and their roles.

    Signals of unlearned rows are higher by `effect`; with `neither` a third of the rows
    are neither unlearned nor unseen.
    """
    rng = np.random.default_rng(seed)
    role = rng.integers(3 if neither else 2, size=(models, rows))
    unlearned, unseen = role == 0, role == 1
    signals = 3 * rng.normal(size=rows) + rng.normal(size=(models, rows))
    return signals + effect * unlearned, unlearned, unseen


def by_role(signals, *roles):
    return [np.where(role, signals, np.nan) for role in roles]


@pytest.mark.parametrize("own", [False, True])
def test_lira_is_the_log_ratio_of_two_normal_densities(own):
    rng = np.random.default_rng(0)
    c_in, c_out = rng.normal(size=(8, 20)) + 1, 2 * rng.normal(size=(6, 20))
    target = rng.normal(size=20)
    attack = lira.lira(c_in, c_out, target, per_row_variance=own)
    logs = []
    for side in (c_in, c_out):
        std = side.std(axis=0, ddof=1)
        std = std if own else np.sqrt((std**2).mean())
        logs.append(scipy.stats.norm.logpdf(target, side.mean(axis=0), std))
    np.testing.assert_allclose(attack.score, logs[0] - logs[1], atol=EXACT)
    assert attack.num_shadows == 14


@pytest.mark.parametrize("own", [False, True])
def test_leave_one_out_uses_all_other_models_as_shadows(own, monkeypatch):
    monkeypatch.setattr(lira, "MIN_SHADOWS_FOR_PER_ROW_VARIANCE", 1 if own else 99)
    signals, *roles = pool(models=12, rows=30, effect=1, neither=True)
    attack = lira.lira_leave_one_out(signals, *roles)
    assert attack.num_shadows == 11
    for k, score in enumerate(attack.score):
        sides = by_role(np.delete(signals, k, 0), *np.delete(roles, k, 1))
        expected = lira.lira(*sides, signals[k], per_row_variance=own).score
        expected[~roles[0][k] & ~roles[1][k]] = np.nan
        np.testing.assert_allclose(score, expected, atol=1e-7)


@pytest.mark.parametrize("neither", [False, True])
def test_pool_that_remembers_is_distinguished_from_one_that_does_not(neither):
    def attack(effect):
        signals, unlearned, unseen = pool(effect=effect, neither=neither)
        scores = lira.lira_leave_one_out(signals, unlearned, unseen)
        plain = auc_interval(Signals(signals[unlearned], signals[unseen]))
        result = lira.evaluate_pool(scores, unlearned)
        assert result.shadows == 15
        return [require(x) for x in (*result[:4], plain)]

    (auc, accuracy, tpr_1, tpr_01, _) = attack(0)
    assert auc.low < 0.5 < auc.high < 0.56 and accuracy.low < 0.5 < accuracy.high
    assert tpr_1.low < 0.01 < tpr_1.high and tpr_01.value < 0.01
    (auc, accuracy, _, _, plain) = attack(1)
    # Without shadow models the different difficulty of the rows hides the effect.
    assert auc.low > plain.high + 0.05 and accuracy.low > 0.55
    (auc, _, tpr_1, tpr_01, _) = attack(3)
    assert auc.value > 0.95 and tpr_1.low > 0.3 and tpr_01.low > 0.1


def test_attack_on_one_target_is_measured_on_its_rows():
    signals, *roles = pool(models=33, rows=600, effect=2)
    scores = lira.lira(*by_role(signals[1:], *np.array(roles)[:, 1:]), signals[0])
    result = lira.evaluate_attack(scores, roles[0][0])
    split = Signals(*(scores.score[role[0]] for role in roles))
    assert result.auc == auc_interval(split) and require(result.auc).low > 0.8
    rates = (split.members > 0).mean(), (split.nonmembers <= 0).mean()
    accuracy = require(result.accuracy)
    assert accuracy.value == pytest.approx(np.mean(rates)) and accuracy.low > 0.7
    # There are 300 non-members.
    assert result.tpr_1 is not None and result.tpr_01 is None
    assert result.shadows == 32
    assert lira.evaluate_attack(scores, roles[0][0], threshold=None).accuracy is None


def test_extreme_signals_have_finite_scores_and_too_few_models_none():
    signals, unlearned, unseen = pool(models=4, rows=12, effect=1)
    constant = lira.lira_leave_one_out(0 * signals + 3, unlearned, unseen)
    is_known = ~np.isnan(constant.score)
    assert is_known.any() and np.abs(constant.score[is_known]).max() < 1
    huge = lira.lira_leave_one_out(1e6 * signals, unlearned, unseen).score
    assert np.isfinite(huge[is_known]).all()
    single_row = lira.lira(signals[:2, :1], signals[2:, :1], signals[0, :1])
    assert np.isfinite(single_row.score).all()
    # One model on each side has no variance.
    one = lira.lira(signals[:1], signals[1:2], signals[2])
    assert np.isnan(one.score).all()
    assert lira.evaluate_attack(one, unlearned[0]) == (*[None] * 4, 2)
    unknown = lira.AttackScores(np.full((4, 12), np.nan), 3)
    assert lira.evaluate_pool(unknown, unlearned) == (*[None] * 4, 3)


def test_pairs_with_complementary_rows_are_unbiased_if_nothing_is_remembered():
    aucs = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        half = rng.uniform(size=(3, 80)) < 0.5
        unlearned = np.concatenate([[rows, ~rows] for rows in half])
        signals = rng.normal(size=(6, 80))
        pairs = np.arange(6) // 2
        scores = lira.lira_leave_one_out(signals, unlearned, ~unlearned, sets=pairs)
        assert scores.num_shadows == 4
        aucs.append(require(lira.evaluate_pool(scores, unlearned).auc))
    values = np.array([auc.value for auc in aucs])
    assert abs(values.mean() - 0.5) < 4 * values.std() / np.sqrt(60)
    assert np.mean([auc.low <= 0.5 <= auc.high for auc in aucs]) > 0.9


def test_rmia_is_the_fraction_of_the_population_with_a_lower_ratio():
    rng = np.random.default_rng(0)
    target, references = rng.random(20), rng.random((3, 20))
    z, z_references = rng.random(50), rng.random((3, 50))
    ratio = target / (0.65 * references.mean(axis=0) + 0.35)
    population = z / (0.65 * z_references.mean(axis=0) + 0.35)
    expected = (ratio[:, None] > population).mean(axis=1)
    # References without a value are ignored.
    more, z_more = (np.vstack([x, np.nan * x[:1]]) for x in (references, z_references))
    for pools in ((references, z, z_references), (more, z, z_more)):
        attack = lira.rmia(target, *pools)
        np.testing.assert_allclose(attack.score, expected, atol=EXACT)
        assert attack.num_shadows == 3
    # A row that all references have seen has no score.
    more[:, 3] = np.nan
    assert np.isnan(lira.rmia(target, more, z, z_references).score[3])
