"""Attacks with simulated pools of shadow models, whose memorization is known."""

import numpy as np
import pytest

from ccu_jax.audits.shadow_audit import ShadowPool
from ccu_jax.audits.shadow_models import ShadowPlan
from tests.audits.conftest import make_predictions

NUM_SHADOWS, NUM_ROWS, TOTAL = 16, 240, 480
SPLITS = dict.fromkeys(("unlearn", "unseen", "retain", "test"), 120)


def predictions(margins, groups):
    """Returns predictions of two classes, of which every row has the first."""
    logits = {"image": np.stack([margins, np.zeros_like(margins)], axis=1)}
    labels = np.tile([1.0, 0.0], (len(margins), 1))
    return make_predictions(logits, labels, margins, SPLITS, group=groups)


def simulate_pool(remaining, *, group_size=1, num_shadows=NUM_SHADOWS):
    """Returns a pool and predictions of the audited models.

    Training on a row raises its margin by 2, of which unlearning leaves a fraction
    `remaining`. Rows of a group have the same noise.
    """
    rng = np.random.default_rng(0)
    all_groups = np.arange(TOTAL) // group_size
    groups, num_groups = all_groups[:NUM_ROWS], NUM_ROWS // group_size
    is_in = []
    for _ in range(num_shadows // 2):
        half = rng.permutation(num_groups) < num_groups // 2
        is_in += [half[groups], ~half[groups]]
    plan = ShadowPlan(np.arange(NUM_ROWS), np.array(is_in), groups)
    difficulty = rng.normal(size=TOTAL)
    is_trained = np.zeros((num_shadows, TOTAL))
    is_trained[:, :NUM_ROWS] = is_in

    def models(memorization):
        noise = rng.normal(size=(num_shadows, TOTAL))
        noise[:, :NUM_ROWS] = noise[:, groups * group_size]
        margins = difficulty + 0.5 * noise + memorization * is_trained
        return [predictions(x, all_groups) for x in margins]

    pool = ShadowPool.__new__(ShadowPool)  # without training
    originals, unlearned = models(2.0), models(2.0 * remaining)
    vars(pool).update(
        _ids=np.array([f"row{i}" for i in range(NUM_ROWS)]),
        _has_image=np.ones(NUM_ROWS, bool),
        _plan=plan,
        _originals=originals,
        _predict=lambda method, number: unlearned[number],
        _report=lambda *args: None,
    )
    is_unlearn = np.arange(TOTAL) < SPLITS["unlearn"]
    memorization = {"model": 2.0 * remaining, "original": 2.0, "retrain_visual": 0.0}
    targets = {}
    for name, value in memorization.items():
        margins = difficulty + 0.5 * rng.normal(size=TOTAL) + value * is_unlearn
        targets[name] = predictions(margins, all_groups)
    return pool, targets


def audit(remaining, method="scrub", **options):
    pool, targets = simulate_pool(remaining, **options)
    return pool.audit(method, targets)["image"]


def test_every_measure_detects_a_method_that_forgets_nothing():
    result = audit(1.0)
    assert result["shadows"] == NUM_SHADOWS
    for name in ("lira", "rmia", "ulira"):
        assert result[name]["auc"][1] > 0.7, name
        assert result[name]["shadows"] >= NUM_SHADOWS // 2 - 1
    assert result["ulira"]["tpr_1"][1] > 0.2 and result["ulira"]["tpr_01"] is not None
    assert result["ulira_of"]["original"]["auc"][1] > 0.7
    _, low, high = result["ulira_of"]["retrain_visual"]["auc"]
    assert low < 0.5 < high
    score = result["forgetting_score"]
    assert score["models"] == NUM_SHADOWS // 4
    assert score["score"][2] < score["control"][1]
    klom = result["klom"]["unlearn"]["mean"]
    assert klom["score"][1] > klom["control"][2]
    assert result["one_run"]["epsilon"] > 1
    assert result["one_run_control"]["epsilon"] == 0


def test_a_method_that_forgets_everything_equals_the_controls():
    result = audit(0.0)
    for name in ("lira", "ulira"):
        _, low, high = result[name]["auc"]
        assert low < 0.5 < high, name
    assert result["lira"]["auc"][2] < 0.65 and result["one_run"]["epsilon"] < 0.5
    score = result["forgetting_score"]
    assert score["score"] == pytest.approx(score["control"], abs=0.12)
    assert 0.1 < result["final_score"] < 1
    for split in ("unlearn", "retain", "test"):
        klom = result["klom"][split]["mean"]
        assert klom["score"][0] == pytest.approx(klom["control"][0], rel=0.25), split


def test_rows_of_a_group_count_as_one():
    widths = {}
    for size in (1, 6):
        result = audit(0.0, group_size=size)
        intervals = {
            "forgetting": result["forgetting_score"]["score"],
            "klom": result["klom"]["unlearn"]["mean"]["score"],
            "lira": result["lira"]["auc"],
            "ulira": result["ulira"]["auc"],
        }
        widths[size] = {name: high - low for name, (_, low, high) in intervals.items()}
        assert result["one_run"]["canaries"] == NUM_ROWS // size
    for name, width in widths[6].items():
        assert width > 1.5 * widths[1][name], name


def test_references_and_small_pools_lack_results():
    result = audit(1.0, "retrain_visual")
    assert result["lira"]["auc"] and result["one_run"] is None
    missing = ("ulira", "ulira_of", "forgetting_score", "final_score", "klom")
    assert not any(result[name] for name in missing)
    result = audit(1.0, num_shadows=8)
    assert result["ulira"]["auc"][1] > 0.6 and result["forgetting_score"] is None


def test_a_shadow_model_with_nan_logits_is_left_out():
    pool, targets = simulate_pool(1.0)
    pool._originals[3].logits["image"][:] = np.nan
    result = pool.audit("scrub", targets)["image"]
    assert result["lira"]["auc"][1] > 0.7 and result["ulira"]["auc"][1] > 0.7
    assert result["forgetting_score"] is None
