"""What a pool of shadow models tells, of pools whose memory is known."""

import types

import numpy as np
import pytest

from ccu_jax.audits import shadow_audit as pool_audit
from ccu_jax.audits.shadow_models import ShadowPlan
from ccu_jax.evaluate.predictions import Predictions

SHADOWS, ROWS, KEPT = 16, 240, 120


def said(margins, of):
    """Outputs of a model of two classes whose first is right for all rows."""
    logits = np.stack([margins, np.zeros_like(margins)], axis=1)
    return Predictions(
        logits={"image": logits},
        pair=margins,
        labels=np.tile([1.0, 0.0], (len(margins), 1)),
        split=of,
        id=np.array([f"row{i}" for i in range(len(margins))]),
        has_image=np.ones(len(margins), bool),
        has_text=np.ones(len(margins), bool),
        multi_label=False,
        trunk_probe=margins,
        group=np.arange(len(margins)),
    )


def pool_of(left: float, *, size: int = 1, count: int = SHADOWS):
    """A pool that knows rows by 2, of whose memory `left` is left after unlearning.

    Rows come in groups of `size`, whose rows say the same.
    """
    rng = np.random.default_rng(0)
    of = np.repeat(["unlearn", "unseen", "retain", "test"], [120, 120, KEPT, KEPT])
    group = np.arange(ROWS) // size
    shown = []
    for _ in range(count // 2):
        half = rng.permutation(group.max() + 1) < (group.max() + 1) // 2
        shown += [half[group], ~half[group]]
    hard = rng.normal(size=len(of))
    known = np.zeros((count, len(of)))
    known[:, :ROWS] = shown

    def models(memory):
        noise = np.array([rng.normal(size=len(of)) for _ in range(count)])
        noise[:, :ROWS] = noise[:, :ROWS][:, group * size]
        return [said(m, of) for m in hard + 0.5 * noise + memory * known]

    pool = pool_audit.ShadowPool.__new__(pool_audit.ShadowPool)
    pool._ctx = types.SimpleNamespace(
        data=types.SimpleNamespace(
            id=np.array([f"row{i}" for i in range(len(of))]),
            has_image=np.ones(len(of), bool),
        )
    )
    pool._plan = ShadowPlan(np.arange(ROWS), np.array(shown), group)
    pool._originals, unlearned = models(2.0), models(2.0 * left)
    pool._predict = lambda method, number: unlearned[number]
    pool._report = lambda *told: None
    noise = rng.normal(size=(3, len(of)))
    of_unlearn = (of == "unlearn").astype(float)
    told = {"model": 2.0 * left, "original": 2.0, "retrain_visual": 0.0}
    targets = {
        name: said(hard + 0.5 * e + memory * of_unlearn, of)
        for (name, memory), e in zip(told.items(), noise, strict=True)
    }
    return pool, targets


def test_a_pool_that_still_remembers_is_found_by_every_measure():
    pool, models = pool_of(1.0)
    found = pool.audit("scrub", models)["image"]
    assert found["shadows"] == SHADOWS
    for name in ("lira", "rmia", "ulira"):
        assert found[name]["auc"][1] > 0.7, name
        assert found[name]["shadows"] >= SHADOWS // 2 - 1
    assert found["ulira"]["tpr_1"][1] > 0.2 and found["ulira"]["tpr_01"] is not None
    assert found["ulira_of"]["original"]["auc"][1] > 0.7
    low, high = found["ulira_of"]["retrain_visual"]["auc"][1:]
    assert low < 0.5 < high
    score = found["forgetting_score"]
    assert score["models"] == SHADOWS // 4
    assert score["score"][2] < score["control"][1]
    apart = found["klom"]["unlearn"]["mean"]
    assert apart["score"][1] > apart["control"][2]
    assert found["one_run"]["epsilon"] > 1
    assert found["one_run_control"]["epsilon"] == 0


def test_a_pool_that_has_forgotten_is_like_one_that_never_saw_the_rows():
    pool, models = pool_of(0.0)
    found = pool.audit("scrub", models)["image"]
    for name in ("lira", "ulira"):
        assert found[name]["auc"][1] < 0.5 < found[name]["auc"][2], name
    assert found["lira"]["auc"][2] < 0.65 and found["one_run"]["epsilon"] < 0.5
    score = found["forgetting_score"]
    assert score["score"] == pytest.approx(score["control"], abs=0.12)
    assert 0.1 < found["final_score"] < 1
    for of in ("unlearn", "retain", "test"):
        apart = found["klom"][of]["mean"]
        assert apart["score"][0] == pytest.approx(apart["control"][0], rel=0.25), of


def test_rows_of_a_group_count_as_one():
    widths = {}
    for size in (1, 6):
        pool, models = pool_of(0.0, size=size)
        found = pool.audit("scrub", models)["image"]
        measured = {
            "forgetting": found["forgetting_score"]["score"],
            "klom": found["klom"]["unlearn"]["mean"]["score"],
            "lira": found["lira"]["auc"],
            "ulira": found["ulira"]["auc"],
        }
        widths[size] = {name: high - low for name, (_, low, high) in measured.items()}
        assert found["one_run"]["canaries"] == ROWS // size
    for name, width in widths[6].items():
        assert width > 1.5 * widths[1][name], name


def test_references_and_small_pools_have_what_can_be_measured():
    pool, models = pool_of(1.0)
    found = pool.audit("retrain_visual", models)["image"]
    assert found["lira"]["auc"] and found["one_run"] is None
    nothing = ("ulira", "ulira_of", "forgetting_score", "final_score", "klom")
    assert not any(found[name] for name in nothing)
    pool, models = pool_of(1.0, count=8)
    found = pool.audit("scrub", models)["image"]
    assert found["ulira"]["auc"][1] > 0.6 and found["forgetting_score"] is None


def test_a_shadow_that_says_no_numbers_is_left_out():
    pool, models = pool_of(1.0)
    pool._originals[3].logits["image"][:] = np.nan
    found = pool.audit("scrub", models)["image"]
    assert found["lira"]["auc"][1] > 0.7 and found["ulira"]["auc"][1] > 0.7
    assert found["forgetting_score"] is None
