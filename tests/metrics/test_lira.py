"""Attacks with shadow models see what single models hide, and nothing else."""

import numpy as np
import pytest
import scipy.stats

from ccu_jax.metrics import lira as shadow
from ccu_jax.metrics import membership
from ccu_jax.metrics.roc import auc_interval

EXACT = 1e-9


def pool(seed=0, models=16, rows=400, effect=0.0, neither=False):
    """Signals [K, N] of rows of very different ease, and who unlearned, never saw."""
    rng = np.random.default_rng(seed)
    role = rng.integers(3 if neither else 2, size=(models, rows))
    unlearned, unseen = role == 0, role == 1
    signals = 3 * rng.normal(size=rows) + rng.normal(size=(models, rows))
    return signals + effect * unlearned, unlearned, unseen


@pytest.mark.parametrize("own", [False, True])
def test_lira_is_the_ratio_of_two_normal_distributions(own):
    rng = np.random.default_rng(0)
    c_in, c_out = rng.normal(size=(8, 20)) + 1, 2 * rng.normal(size=(6, 20))
    target = rng.normal(size=20)
    found = shadow.lira(c_in, c_out, target, own_variance=own)
    logs = []
    for side in (c_in, c_out):
        spread = side.std(axis=0, ddof=1)
        spread = spread if own else np.sqrt((spread**2).mean())
        logs.append(scipy.stats.norm.logpdf(target, side.mean(axis=0), spread))
    np.testing.assert_allclose(found.score, logs[0] - logs[1], atol=EXACT)
    assert found.num_shadows == 14
    default = shadow.lira(c_in, c_out, target).score
    assert (default == found.score).all() == (not own)


def test_from_64_models_a_side_on_each_row_has_its_own_variance():
    c_in, c_out = np.random.default_rng(0).normal(size=(2, 64, 10))
    target = np.zeros(10)
    many = shadow.lira(c_in, c_out, target).score
    assert (many == shadow.lira(c_in, c_out, target, own_variance=True).score).all()
    fewer = shadow.lira(c_in[1:], c_out, target).score
    shared = shadow.lira(c_in[1:], c_out, target, own_variance=False).score
    assert (fewer == shared).all()


@pytest.mark.parametrize("own", [False, True])
def test_leaving_one_out_is_asking_it_with_all_others(own):
    signals, unlearned, unseen = pool(models=12, rows=30, effect=1, neither=True)
    found = shadow.lira_leave_one_out(signals, unlearned, unseen, own_variance=own)
    assert found.num_shadows == 11
    for k in range(12):
        others = np.arange(12) != k
        sides = [
            np.where(role, signals, np.nan)[others] for role in (unlearned, unseen)
        ]
        expected = shadow.lira(*sides, signals[k], own_variance=own).score
        asked = unlearned[k] | unseen[k]
        np.testing.assert_allclose(found.score[k][asked], expected[asked], atol=1e-7)
        assert np.isnan(found.score[k][~asked]).all()


@pytest.mark.parametrize("neither", [False, True])
def test_a_pool_that_remembers_is_told_from_one_that_does_not(neither):
    def attack(effect):
        signals, unlearned, unseen = pool(effect=effect, neither=neither)
        scores = shadow.lira_leave_one_out(signals, unlearned, unseen)
        every = auc_interval(signals[unlearned], signals[unseen])
        return shadow.evaluate_pool(scores, unlearned), every

    (none, _), (some, plain), (much, _) = (attack(e) for e in (0, 1, 3))
    assert none.auc.low < 0.5 < none.auc.high < 0.56
    assert none.accuracy.low < 0.5 < none.accuracy.high
    assert none.tpr_1.low < 0.01 < none.tpr_1.high and none.tpr_01.value < 0.01
    # The attack without shadow models sees little: rows differ more than models do.
    assert some.auc.low > plain.high + 0.05 and some.accuracy.low > 0.55
    assert much.auc.value > 0.95 and much.tpr_1.low > 0.3 and much.tpr_01.low > 0.1
    assert none.shadows == some.shadows == 15


def test_intervals_of_a_pool_hold_the_truth_as_often_as_they_say():
    held = []
    for seed in range(100):
        signals, unlearned, unseen = pool(seed, rows=100)
        scores = shadow.lira_leave_one_out(signals, unlearned, unseen)
        found = shadow.evaluate_pool(scores, unlearned).auc
        held.append(found.low <= 0.5 <= found.high)
    assert np.mean(held) >= 0.88


def test_memory_of_a_fifth_of_the_rows_is_caught_at_few_false_alarms():
    signals, unlearned, unseen = pool(rows=500)
    signals[:, :100] += 8 * unlearned[:, :100]
    scores = shadow.lira_leave_one_out(signals, unlearned, unseen)
    found = shadow.evaluate_pool(scores, unlearned)
    assert found.tpr_1.value > 0.12 and found.tpr_1.low > 0.01


def test_one_target_is_measured_by_its_rows():
    signals, unlearned, unseen = pool(models=33, rows=600, effect=2)
    sides = [np.where(r, signals, np.nan)[1:] for r in (unlearned, unseen)]
    scores = shadow.lira(*sides, signals[0])
    found = shadow.evaluate_attack(scores, unlearned[0])
    expected = auc_interval(scores.score[unlearned[0]], scores.score[unseen[0]])
    assert found.auc == expected and expected.low > 0.8
    right = (scores.score > 0) == unlearned[0]
    shares = [right[role[0]].mean() for role in (unlearned, unseen)]
    assert found.accuracy.value == pytest.approx(np.mean(shares))
    assert found.accuracy.low > 0.7
    assert found.tpr_1 is not None and found.tpr_01 is None  # of 300 others
    assert found.shadows == 32


def test_edges_are_finite_or_unknown():
    signals, unlearned, unseen = pool(models=4, rows=12, effect=1)
    same = shadow.lira_leave_one_out(0 * signals + 3, unlearned, unseen)
    known = ~np.isnan(same.score)
    assert known.any() and np.abs(same.score[known]).max() < 1
    huge = shadow.lira_leave_one_out(1e6 * signals, unlearned, unseen).score
    assert np.isfinite(huge[known]).all()
    # Of one model a side no variance is known.
    one = shadow.lira(signals[:1], signals[1:2], signals[2])
    assert np.isnan(one.score).all()
    nothing = shadow.evaluate_attack(one, unlearned[0])
    assert nothing == (None, None, None, None, 2)
    blank = shadow.AttackScores(np.full((4, 12), np.nan), 3)
    assert shadow.evaluate_pool(blank, unlearned) == (None, None, None, None, 3)
    single = shadow.lira(signals[:2, :1], signals[2:, :1], signals[0, :1])
    assert np.isfinite(single.score).all()


def test_the_order_of_rows_and_models_changes_nothing():
    signals, unlearned, unseen = pool(models=8, rows=60, effect=1, neither=True)
    rng = np.random.default_rng(0)
    models, rows = rng.permutation(8)[:, None], rng.permutation(60)
    mixed = [x[models, rows] for x in (signals, unlearned, unseen)]
    one = shadow.lira_leave_one_out(signals, unlearned, unseen)
    two = shadow.lira_leave_one_out(*mixed)
    np.testing.assert_allclose(one.score[models, rows], two.score, atol=1e-9)
    found = shadow.evaluate_pool(one, unlearned), shadow.evaluate_pool(two, mixed[1])
    assert found[0].auc == pytest.approx(found[1].auc)


# --- RMIA -----------------------------------------------------------------------------


def test_rmia_is_the_share_of_others_that_a_row_beats():
    rng = np.random.default_rng(0)
    target, references = rng.random(20), rng.random((3, 20))
    z, z_references = rng.random(50), rng.random((3, 50))
    for gamma in (1.0, 1.5):
        found = shadow.rmia(target, references, z, z_references, gamma=gamma)
        ratio = target / (0.65 * references.mean(axis=0) + 0.35)
        others = z / (0.65 * z_references.mean(axis=0) + 0.35)
        expected = (ratio[:, None] / others > gamma).mean(axis=1)
        np.testing.assert_allclose(found.score, expected, atol=EXACT)
        assert found.num_shadows == 3


def test_rmia_sees_memory_that_the_ease_of_rows_hides():
    rng = np.random.default_rng(0)
    ease = 3 * rng.normal(size=2000)
    members = np.arange(2000) < 500
    references = 1 / (1 + np.exp(-ease - 0.3 * rng.normal(size=(4, 2000))))

    def attack(effect):
        said = ease + effect * members + 0.3 * rng.normal(size=2000)
        target, z = 1 / (1 + np.exp(-said)), np.arange(2000) >= 1000
        scores = shadow.rmia(target, references, target[z], references[:, z])
        rows = ~z  # the population is not attacked
        found = shadow.AttackScores(scores.score[rows], scores.num_shadows)
        plain = auc_interval(target[members], target[rows & ~members])
        return shadow.evaluate_attack(found, members[rows], threshold=None), plain

    none, _ = attack(0)
    some, plain = attack(1)
    assert none.auc.low < 0.5 < none.auc.high and none.accuracy is None
    assert some.auc.low > plain.high and some.shadows == 4


def test_the_probability_of_the_truth_is_the_geometric_mean_over_labels():
    logits = np.log([[0.7 / 0.3, 0.2 / 0.8]])
    found = membership.true_probability(logits, np.array([[1, 0]]), True)
    assert found == pytest.approx([np.sqrt(0.7 * 0.8)])
    logits = np.log([[0.7, 0.2, 0.1]])
    assert membership.true_probability(logits, np.eye(3)[[1]], False) == pytest.approx(
        0.2
    )


def test_a_shadow_that_says_nothing_is_left_out_of_rmia():
    rng = np.random.default_rng(3)
    references, z_references = rng.uniform(size=(5, 40)), rng.uniform(size=(5, 60))
    target, z = rng.uniform(size=40), rng.uniform(size=60)
    expected = shadow.rmia(target, references, z, z_references)
    blank = np.full((1, 100), np.nan)
    more = np.concatenate([references, blank[:, :40]])
    found = shadow.rmia(target, more, z, np.concatenate([z_references, blank[:, :60]]))
    np.testing.assert_allclose(found.score, expected.score)
    assert found.num_shadows == expected.num_shadows == 5
    # Rows that all references have seen have no score.
    more[:, 3] = np.nan
    assert np.isnan(shadow.rmia(target, more, z, z_references).score[3])


def test_pairs_that_share_the_rows_find_nothing_where_nothing_is_remembered():
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        half = rng.uniform(size=(3, 80)) < 0.5
        shown = np.concatenate([[mine, ~mine] for mine in half])
        signals = rng.normal(size=(6, 80))
        pairs = np.arange(6) // 2
        scores = shadow.lira_leave_one_out(signals, shown, ~shown, sets=pairs)
        assert scores.num_shadows == 4
        found.append(shadow.evaluate_pool(scores, shown).auc)
    values = np.array([x.value for x in found])
    assert abs(values.mean() - 0.5) < 4 * values.std() / np.sqrt(60)
    assert np.mean([x.low <= 0.5 <= x.high for x in found]) > 0.9
