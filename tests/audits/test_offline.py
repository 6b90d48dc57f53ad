"""From stored outputs to a verdict: records, their form, models with known faults."""

import json

import numpy as np
import pytest

from ccu_jax.audits import offline as outputs
from ccu_jax.audits import verdict
from ccu_jax.audits.offline import AuditInputs
from ccu_jax.audits.verdict import (
    FORGOTTEN,
    INCONCLUSIVE,
    NOT_FORGOTTEN,
    OVER_FORGOTTEN,
)
from ccu_jax.evaluate import predictions
from ccu_jax.metrics import privacy as epsilon
from ccu_jax.metrics import roc as auc

K, SEEDS = 5, 6
SIZES = {"retain": 300, "unlearn": 400, "unseen": 500, "validation": 20, "test": 200}


def model(seed, *, knows=0.0, share=1.0, multi_label=False, random=False, nan=False):
    """Outputs of a model that knows `share` of the unlearn set by so much more."""
    rng = np.random.default_rng(0)
    of = np.repeat(list(SIZES), list(SIZES.values()))
    if multi_label:
        labels = (rng.random((len(of), K)) < 0.4).astype(np.float32)
    else:
        labels = np.eye(K, dtype=np.float32)[rng.integers(K, size=len(of))]
    # How hard a row is, all models find alike.
    hard = rng.normal(size=(len(of), K))
    own = np.random.default_rng([seed, 1])
    known = (of == "unlearn") & (rng.random(len(of)) < share)
    sure = 1.5 + knows * known[:, None]
    logits = {}
    for view in ("image", "text", "fused"):
        noise = hard + 0.3 * own.normal(size=hard.shape)
        logits[view] = (sure * (2 * labels - 1) + noise).astype(np.float32)
        if random:
            logits[view] = own.normal(size=hard.shape).astype(np.float32)
        if nan:
            logits[view][:] = np.nan
    pair = 0.3 * hard[:, 0] + 0.1 * own.normal(size=len(of)) + 0.3 * knows * known
    return predictions.Predictions(
        logits=logits,
        pair=own.normal(size=len(of)) if random else pair,
        labels=labels,
        split=of,
        id=np.array([f"row{i}" for i in range(len(of))]),
        has_image=np.ones(len(of), bool),
        has_text=np.ones(len(of), bool),
        multi_label=multi_label,
        trunk_probe=pair,
        group=np.arange(len(of)),
    )


def judged(found, *, multi_label=False):
    """The verdict on a model over some seeds, with the usual models beside it."""
    records = []
    for seed in range(SEEDS):
        original = model(10 + seed, knows=3.0, multi_label=multi_label)
        reference = model(20 + seed, multi_label=multi_label)
        control = model(30 + seed, multi_label=multi_label)
        given = AuditInputs(found(seed), original, reference, control)
        records.append(outputs.audit_outputs(given))
    return verdict.verdict_over_seeds(records), records


@pytest.mark.parametrize("multi_label", [False, True])
def test_models_with_known_faults_get_the_words_that_they_deserve(multi_label):
    of = {"multi_label": multi_label}
    original, _ = judged(lambda s: model(10 + s, knows=3.0, **of), **of)
    retrained, _ = judged(lambda s: model(40 + s, **of), **of)
    empty, _ = judged(lambda s: model(50 + s, random=True, **of), **of)
    too_far, _ = judged(lambda s: model(60 + s, knows=-1.5, **of), **of)
    fifth, records = judged(lambda s: model(70 + s, knows=6.0, share=0.2, **of), **of)
    assert original["word"] == NOT_FORGOTTEN and retrained["word"] == FORGOTTEN
    assert empty["word"] == OVER_FORGOTTEN and too_far["word"] == OVER_FORGOTTEN
    assert fifth["word"] == NOT_FORGOTTEN
    assert fifth["views"][verdict.LOW_FPR]["word"] == NOT_FORGOTTEN
    for record in records:  # strict JSON, whatever was measured
        json.dumps(record, allow_nan=False)


def test_a_reference_is_at_no_distance_from_itself():
    reference = model(20)
    given = AuditInputs(reference, model(10, knows=3.0), reference, None)
    record = outputs.audit_outputs(given)
    gaps = record["gaps"]
    assert gaps["average_gap"] == [0, 0, 0] and gaps["tug_of_war"] == [1, 1, 1]
    assert record["distances"]["test"]["image"]["agreement"][0] == 1
    assert record["attacks"]["image"]["loss"]["difference"][0] == 0
    assert record["attacks"]["image"]["loss"]["control"] is None


def test_every_attack_has_both_intervals_and_they_agree():
    others = model(10, knows=3.0), model(20), model(30)
    record = outputs.audit_outputs(AuditInputs(model(1, knows=1.0), *others))
    assert set(record["attacks"]) >= {"image", "text", "fused", "pair"}
    for signals in record["attacks"].values():
        for told in signals.values():
            drawn, formula = told["bootstrap"], told["auc"]
            assert drawn[0] == pytest.approx(formula[0])
            # That of 95 %, and that of more.
            assert formula[1] - 0.02 < drawn[1] < drawn[0] < drawn[2]
            assert drawn[2] < formula[2] + 0.02


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_says_no_numbers_breaks_nothing(multi_label, value):
    broken = model(1, multi_label=multi_label)
    for logits in broken.logits.values():
        logits[::3] = value
    others = (model(10, knows=3.0, multi_label=multi_label),)
    others += (model(20, multi_label=multi_label), model(30, multi_label=multi_label))
    record = outputs.audit_outputs(AuditInputs(broken, *others))
    json.dumps(record, allow_nan=False)
    assert verdict.verdict_over_seeds([record])["word"] == INCONCLUSIVE


def test_what_cannot_be_measured_is_left_out_and_breaks_nothing():
    broken, alone = model(1, nan=True), model(2)
    record = outputs.audit_outputs(
        AuditInputs(broken, model(10, knows=3.0), model(20), None)
    )
    json.dumps(record, allow_nan=False)
    assert record["attacks"]["image"]["loss"]["auc"] is None
    assert verdict.verdict_over_seeds([record])["word"] == INCONCLUSIVE
    record["diverged"] = "step 3: loss nan"
    assert (
        verdict.verdict_over_seeds([record])["sentence"] == "diverged: step 3: loss nan"
    )
    record = outputs.audit_outputs(AuditInputs(alone, None, None, None))
    assert record["score_difference"]["image"] is None and not record["distances"]
    told = verdict.verdict_over_seeds([record])
    assert told["word"] == INCONCLUSIVE and "no retrain_visual" in told["sentence"]
    with pytest.raises(ValueError, match="different rows"):
        other = alone._replace(id=alone.id[::-1])
        outputs.audit_outputs(AuditInputs(alone, None, other, None))


def given_models(**more):
    others = model(10, knows=3.0), model(20), model(30)
    return AuditInputs(model(1, knows=0.5), *others)._replace(**more)


def test_a_record_tells_whose_differences_these_are_and_at_which_confidence():
    given = given_models()
    record = outputs.audit_outputs(given)
    level = 1 - 0.05 / 6  # six questions at once
    image = {
        name: outputs.attack_signals(x)["image"]["loss"]
        for name, x in given._asdict().items()
    }
    told = record["attacks"]["image"]["loss"]
    own = auc.auc_interval(image["model"], level)
    assert told["auc"] == pytest.approx(own)
    whose = {"difference": "model", "original": "original", "control": "control"}
    for key, name in whose.items():
        apart = auc.auc_difference(image[name], image["reference"], level)
        assert told[key] == pytest.approx(apart), key
    assert told["original"] != pytest.approx(told["control"], abs=0.02)
    assert record["epsilon"]["image"] == epsilon.threshold_epsilon(
        image["model"], confidence=1 - 0.05 / 3
    )


def test_rows_without_a_picture_say_nothing_of_pictures():
    def without(given, change):
        found = []
        for x in given:
            has = x.has_image.copy()
            has[::7] = False
            x = x._replace(has_image=has, logits={**x.logits})
            if change:
                for view in ("image", "fused"):
                    logits = x.logits[view].copy()
                    logits[::7] = 9.0
                    x.logits[view] = logits
            found.append(x)
        return outputs.audit_outputs(AuditInputs(*found))

    before, after = (without(given_models(), change) for change in (False, True))
    for key in ("attacks", "epsilon", "gaps", "score_difference"):
        one, other = before[key], after[key]
        if key in ("attacks", "score_difference"):
            one, other = one["image"], other["image"]
        assert one == other, key
    assert before["attacks"]["fused"] == after["attacks"]["fused"]


def test_scores_are_those_of_their_set_and_the_gap_asks_unseen_rows():
    given = given_models()
    # Wrong on all test rows: that is no matter of the other sets, nor of the attack.
    worse = given.model._replace(logits={**given.model.logits})
    logits = worse.logits["image"].copy()
    logits[worse.split == "test"] *= -1
    worse.logits["image"] = logits
    before = outputs.audit_outputs(given)
    after = outputs.audit_outputs(given._replace(model=worse))
    for of in ("unlearn", "unseen"):
        assert before["scores"][of] == after["scores"][of]
    right = [x["scores"]["test"]["image"]["right"][0] for x in (before, after)]
    assert right[1] < right[0] - 0.3
    assert before["attacks"] == after["attacks"]
    # One of four gaps has grown, by what was lost on the test set.
    assert after["gaps"]["average_gap"][0] - before["gaps"]["average_gap"][0] == (
        pytest.approx(25 * (right[0] - right[1]), abs=0.6)
    )


def test_groups_widen_every_interval_of_a_record():
    given = given_models()
    group = np.arange(len(given.model.split)) // 10
    grouped = AuditInputs(*(x._replace(group=group) for x in given))
    one, other = outputs.audit_outputs(given), outputs.audit_outputs(grouped)

    def widths(record):
        loss = record["attacks"]["image"]["loss"]
        found = {k: loss[k] for k in ("auc", "bootstrap", "tpr_1", "tpr_1_difference")}
        found["score"] = record["score_difference"]["image"]
        found["excess"] = record["score_excess"]["image"]
        found["js"] = record["distances"]["unlearn"]["image"]["js_divergence"]
        return {name: high - low for name, (_, low, high) in found.items()}

    alone, together = widths(one), widths(other)
    for name, width in together.items():
        # Rows of a group here have nothing in common but that they count as few.
        assert width != pytest.approx(alone[name], rel=1e-3), name
    assert other["epsilon"]["image"] != one["epsilon"]["image"]


def test_who_is_better_at_all_pictures_alike_is_not_still_there():
    def better(seed):
        x = model(40 + seed)
        both = np.isin(x.split, ("unlearn", "unseen"))
        x.logits["image"][both] *= np.where(x.logits["image"][both] > 0, 1.0, 0.3)
        sure = 2.0 * (2 * x.labels - 1)
        x.logits["image"][both] += sure[both].astype(np.float32)
        return x

    found, records = judged(better)
    assert records[0]["score_difference"]["image"][0] > 0.05
    assert found["views"]["image"]["word"] == FORGOTTEN


@pytest.mark.parametrize("seeds", [1, 3])
def test_few_seeds_do_not_turn_a_word_into_another(seeds):
    faults = {
        NOT_FORGOTTEN: lambda s: model(10 + s, knows=3.0),
        OVER_FORGOTTEN: lambda s: model(50 + s, random=True),
        FORGOTTEN: lambda s: model(40 + s),
    }
    for word, make in faults.items():
        found = verdict.verdict_over_seeds(judged(make)[1][:seeds])
        assert found["word"] in (word, INCONCLUSIVE)
        if word != FORGOTTEN:
            assert found["word"] == word


def test_errors_do_not_even_out_over_seeds_that_forget_the_same_rows():
    _, records = judged(lambda s: model(40 + s))
    one = verdict.verdict_over_seeds(records)["differences"]["image"]
    others = [record | {"members": str(n)} for n, record in enumerate(records)]
    other = verdict.verdict_over_seeds(others)["differences"]["image"]
    assert one[0] == pytest.approx(other[0])
    assert one[2] - one[1] > 1.3 * (other[2] - other[1])
    told = verdict.verdict_over_seeds(records, is_reference=True)
    assert told["word"] == "reference" and told["differences"]["image"] is None
