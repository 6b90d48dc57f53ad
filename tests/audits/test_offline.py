"""Measurements of stored outputs, and the verdicts on simulated models."""

import functools
import json

import numpy as np
import pytest

from ccu_jax.audits import offline, verdict
from ccu_jax.audits.offline import CONFIDENCE, AuditInputs
from ccu_jax.audits.verdict import (
    FORGOTTEN,
    INCONCLUSIVE,
    NOT_FORGOTTEN,
    OVER_FORGOTTEN,
)
from ccu_jax.evaluate.predictions import Predictions
from ccu_jax.metrics.privacy import threshold_epsilon
from ccu_jax.metrics.roc import auc_difference, auc_interval

NUM_CLASSES, NUM_SEEDS = 5, 6
SIZES = {"retain": 300, "unlearn": 400, "unseen": 500, "validation": 20, "test": 200}


def simulate(
    seed, *, memorization=0.0, fraction=1.0, multi_label=False, is_random=False
):
    """Returns the outputs of a model that memorized a fraction of the unlearn set.

    All models find the same rows hard.
    """
    shared, own = np.random.default_rng(0), np.random.default_rng([seed, 1])
    split = np.repeat(list(SIZES), list(SIZES.values()))
    num_rows = len(split)
    if multi_label:
        labels = (shared.random((num_rows, NUM_CLASSES)) < 0.4).astype(np.float32)
    else:
        classes = shared.integers(NUM_CLASSES, size=num_rows)
        labels = np.eye(NUM_CLASSES, dtype=np.float32)[classes]
    difficulty = shared.normal(size=(num_rows, NUM_CLASSES))
    is_memorized = (split == "unlearn") & (shared.random(num_rows) < fraction)
    logits = {}
    for view in ("image", "text", "fused"):
        noise = own.normal(size=difficulty.shape)
        margin = 1.5 + memorization * is_memorized[:, None]
        logits[view] = margin * (2 * labels - 1) + difficulty + 0.3 * noise
        if is_random:
            logits[view] = own.normal(size=difficulty.shape)
        logits[view] = logits[view].astype(np.float32)
    noise = own.normal(size=num_rows)
    pair = 0.3 * difficulty[:, 0] + 0.1 * noise + 0.3 * memorization * is_memorized
    pair = noise if is_random else pair
    return Predictions(
        logits=logits,
        pair=pair,
        labels=labels,
        split=split,
        id=np.array([f"row{i}" for i in range(num_rows)]),
        has_image=np.ones(num_rows, bool),
        has_text=np.ones(num_rows, bool),
        multi_label=multi_label,
        trunk_probe=pair,
        group=np.arange(num_rows),
    )


def make_inputs(model, seed=0, multi_label=False):
    original = simulate(10 + seed, memorization=3.0, multi_label=multi_label)
    references = (simulate(n + seed, multi_label=multi_label) for n in (20, 30))
    return AuditInputs(model, original, *references)


# By name: seed of the first model, options of `simulate`, and verdict.
CASES = {
    "original": (10, {"memorization": 3.0}, NOT_FORGOTTEN),
    "retrained": (40, {}, FORGOTTEN),
    "random weights": (50, {"is_random": True}, OVER_FORGOTTEN),
    "reversed": (60, {"memorization": -1.5}, OVER_FORGOTTEN),
    "a fifth": (70, {"memorization": 6.0, "fraction": 0.2}, NOT_FORGOTTEN),
}


@functools.cache
def audit_case(case, multi_label=False):
    """Returns the records of all seeds, which tests must not change."""
    start, options, _ = CASES[case]
    return [
        offline.audit_outputs(make_inputs(model, seed, multi_label))
        for seed in range(NUM_SEEDS)
        for model in [simulate(start + seed, multi_label=multi_label, **options)]
    ]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_simulated_models_get_the_right_verdict(case, multi_label):
    records = audit_case(case, multi_label)
    json.dumps(records, allow_nan=False)
    result = verdict.verdict_over_seeds(records)
    assert result["word"] == CASES[case][2]
    if case == "a fifth":
        assert result["views"][verdict.LOW_FPR]["word"] == NOT_FORGOTTEN


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("case", ["original", "retrained", "random weights"])
def test_with_few_seeds_a_verdict_is_the_right_one_or_inconclusive(case, num_seeds):
    word = CASES[case][2]
    result = verdict.verdict_over_seeds(audit_case(case)[:num_seeds])
    assert result["word"] in ((word, INCONCLUSIVE) if word == FORGOTTEN else (word,))


def test_the_reference_has_no_distance_from_itself():
    inputs = make_inputs(simulate(20))._replace(control=None)
    record = offline.audit_outputs(inputs)
    gaps = record["gaps"]
    assert gaps["average_gap"] == [0, 0, 0] and gaps["tug_of_war"] == [1, 1, 1]
    assert record["distances"]["test"]["image"]["agreement"][0] == 1
    assert record["attacks"]["image"]["loss"]["difference"][0] == 0
    assert record["attacks"]["image"]["loss"]["control"] is None


def test_bootstrap_and_delong_intervals_agree():
    record = offline.audit_outputs(make_inputs(simulate(1, memorization=1.0)))
    assert set(record["attacks"]) == {"image", "text", "fused", "pair", "white"}
    for signals in record["attacks"].values():
        for result in signals.values():
            value, low, high = result["bootstrap"]
            # The bootstrap's interval has 95 %, DeLong's more.
            assert value == pytest.approx(result["auc"][0])
            assert result["auc"][1] - 0.02 < low < value < high
            assert high < result["auc"][2] + 0.02


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_inconclusive(multi_label, value):
    model = simulate(1, multi_label=multi_label)
    for logits in model.logits.values():
        logits[::3] = value
    record = offline.audit_outputs(make_inputs(model, multi_label=multi_label))
    json.dumps(record, allow_nan=False)
    assert record["attacks"]["image"]["loss"]["auc"] is None
    assert verdict.verdict_over_seeds([record])["word"] == INCONCLUSIVE


def test_without_reference_the_verdict_names_the_remedy():
    model = simulate(2)
    record = offline.audit_outputs(AuditInputs(model, None, None, None))
    assert record["score_difference"]["image"] is None and not record["distances"]
    result = verdict.verdict_over_seeds([record])
    assert result["word"] == INCONCLUSIVE and "--methods" in result["sentence"]
    reference = model._replace(id=model.id[::-1])
    with pytest.raises(ValueError, match="different rows"):
        offline.audit_outputs(AuditInputs(model, None, reference, None))


def test_diverged_methods_and_the_reference_get_no_verdict():
    records = [{"diverged": "step 3: loss nan", "compared": True}]
    result = verdict.verdict_over_seeds(records)
    assert result["sentence"] == "diverged: step 3: loss nan"
    result = verdict.verdict_over_seeds([{"compared": True}], is_reference=True)
    assert result["word"] == "reference" and result["differences"]["image"] is None


def test_differences_are_those_of_the_named_models():
    inputs = make_inputs(simulate(1, memorization=0.5))
    record = offline.audit_outputs(inputs)
    signals = {
        name: offline.attack_signals(model)["image"]["loss"]
        for name, model in inputs._asdict().items()
    }
    result = record["attacks"]["image"]["loss"]
    assert result["auc"] == pytest.approx(auc_interval(signals["model"], CONFIDENCE))
    for key, name in (("difference", "model"), ("original",) * 2, ("control",) * 2):
        difference = auc_difference(signals[name], signals["reference"], CONFIDENCE)
        assert result[key] == pytest.approx(difference), key
    assert result["original"] != pytest.approx(result["control"], abs=0.02)
    epsilon = threshold_epsilon(signals["model"], confidence=1 - 0.05 / 3)
    assert record["epsilon"]["image"] == epsilon


def test_rows_without_image_do_not_affect_image_measurements():
    def audit(change):
        models = []
        for model in make_inputs(simulate(1, memorization=0.5)):
            assert model is not None
            has_image = np.arange(len(model.id)) % 7 > 0
            for view in ("image", "fused") if change else ():
                model.logits[view][~has_image] = 9.0
            models.append(model._replace(has_image=has_image))
        record = offline.audit_outputs(AuditInputs(*models))
        image = {k: record[k]["image"] for k in ("attacks", "score_difference")}
        return image, record["attacks"]["fused"], record["epsilon"], record["gaps"]

    assert audit(change=False) == audit(change=True)


def test_scores_and_gaps_use_the_rows_of_their_split():
    inputs = make_inputs(simulate(1, memorization=0.5))
    before = offline.audit_outputs(inputs)
    inputs.model.logits["image"][inputs.model.split == "test"] *= -1
    after = offline.audit_outputs(inputs)
    assert before["attacks"] == after["attacks"]
    for split in ("unlearn", "unseen"):
        assert before["scores"][split] == after["scores"][split]
    loss = before["scores"]["test"]["image"]["right"][0]
    loss -= after["scores"]["test"]["image"]["right"][0]
    assert loss > 0.3
    # One of four gaps has grown.
    growth = after["gaps"]["average_gap"][0] - before["gaps"]["average_gap"][0]
    assert growth == pytest.approx(25 * loss, abs=0.6)


def test_groups_change_every_interval():
    inputs = make_inputs(simulate(1, memorization=0.5))
    groups = np.arange(len(inputs.model.id)) // 10
    grouped = AuditInputs._make(x and x._replace(group=groups) for x in inputs)

    def widths(inputs):
        record = offline.audit_outputs(inputs)
        keys = ("auc", "bootstrap", "tpr_1", "tpr_1_difference")
        intervals = {key: record["attacks"]["image"]["loss"][key] for key in keys}
        intervals["score"] = record["score_difference"]["image"]
        intervals["excess"] = record["score_excess"]["image"]
        intervals["js"] = record["distances"]["unlearn"]["image"]["js_divergence"]
        widths = {name: high - low for name, (_, low, high) in intervals.items()}
        return widths | {"epsilon": record["epsilon"]["image"]}

    before, after = widths(inputs), widths(grouped)
    for name in before:
        assert after[name] != pytest.approx(before[name], rel=1e-3), name


def test_a_model_that_is_better_on_all_images_has_forgotten():
    records = []
    for seed in range(NUM_SEEDS):
        model = simulate(40 + seed)
        rows = np.isin(model.split, ("unlearn", "unseen"))
        logits = model.logits["image"]
        logits[rows] *= np.where(logits[rows] > 0, 1.0, 0.3)
        logits[rows] += 2 * (2 * model.labels[rows] - 1)
        records.append(offline.audit_outputs(make_inputs(model, seed)))
    assert records[0]["score_difference"]["image"][0] > 0.05
    views = verdict.verdict_over_seeds(records)["views"]
    assert views["image"]["word"] == FORGOTTEN


def test_seeds_with_the_same_rows_have_wider_intervals():
    records = audit_case("retrained")
    value, low, high = verdict.verdict_over_seeds(records)["differences"]["image"]
    records = [record | {"members": str(n)} for n, record in enumerate(records)]
    result = verdict.verdict_over_seeds(records)["differences"]["image"]
    assert result[0] == pytest.approx(value)
    assert high - low > 1.3 * (result[2] - result[1])
