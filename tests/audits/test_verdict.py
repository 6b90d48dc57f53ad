"""Verdicts follow from intervals; all audits of many rows are fast and small."""

import resource
import sys
import time

import numpy as np
import pytest

from ccu_jax.audits import verdict
from ccu_jax.audits.verdict import (
    FORGOTTEN,
    INCONCLUSIVE,
    NOT_FORGOTTEN,
    OVER_FORGOTTEN,
)
from ccu_jax.metrics import distances, forgetting, membership
from ccu_jax.metrics import lira as shadow
from ccu_jax.metrics import membership as attacks
from ccu_jax.metrics import privacy as epsilon
from ccu_jax.metrics import ranking as scores
from ccu_jax.metrics import roc as auc
from ccu_jax.metrics.intervals import Interval, jackknife_interval, mean_interval


def between(low, high):
    return Interval((low + high) / 2, low, high)


@pytest.mark.parametrize(
    "low, high, word",
    [
        (-0.02, 0.03, FORGOTTEN),
        (0.01, 0.04, FORGOTTEN),  # there, but too small to matter
        (-0.04, -0.01, FORGOTTEN),
        (-0.05, 0.05, FORGOTTEN),
        (0.0, 0.0, FORGOTTEN),
        (0.01, 0.06, NOT_FORGOTTEN),
        (0.2, 0.3, NOT_FORGOTTEN),
        (-0.06, -0.01, OVER_FORGOTTEN),
        (-0.4, -0.3, OVER_FORGOTTEN),
        (-0.01, 0.06, INCONCLUSIVE),  # not different is not the same
        (-0.2, 0.2, INCONCLUSIVE),
        (-0.06, 0.01, INCONCLUSIVE),
        (0.0, 0.2, INCONCLUSIVE),
        (float("nan"), float("nan"), INCONCLUSIVE),
    ],
)
def test_the_word_follows_from_the_interval(low, high, word):
    assert verdict.classify(between(low, high)) == word
    mirror = {NOT_FORGOTTEN: OVER_FORGOTTEN, OVER_FORGOTTEN: NOT_FORGOTTEN}.get(
        word, word
    )
    assert verdict.classify(between(-high, -low)) == mirror


def test_a_missing_interval_is_inconclusive():
    assert verdict.classify(None) == INCONCLUSIVE
    found = verdict.judge_view(None)
    assert found.word == INCONCLUSIVE and "not measured" in found.sentence


def test_a_score_decides_only_where_it_is_surely_off():
    same, worse = between(-0.01, 0.01), between(-0.5, -0.4)
    better, unsure = between(0.1, 0.2), between(-0.2, -0.01)
    # Who is better at all pictures alike remembers none.
    given = {
        worse: OVER_FORGOTTEN,
        better: FORGOTTEN,
        unsure: FORGOTTEN,
        None: FORGOTTEN,
    }
    for score, word in given.items():
        found = verdict.judge_view(same, score_difference=score)
        assert found.word == word
        assert score is None or f"{score.value:+.3f}" in found.sentence
    for excess, word in {
        worse: FORGOTTEN,
        better: NOT_FORGOTTEN,
        unsure: FORGOTTEN,
    }.items():
        found = verdict.judge_view(same, score_excess=excess)
        assert found.word == word and f"{excess.value:+.3f}" in found.sentence
    # Of two words it is the worse one.
    both = verdict.judge_view(between(0.1, 0.2), score_difference=worse)
    assert both.word == NOT_FORGOTTEN
    assert verdict.judge_view(None, score_difference=worse).word == OVER_FORGOTTEN


def test_the_sentence_gives_all_numbers():
    found = verdict.judge_view(
        between(0.01, 0.04),
        attack=between(0.5, 0.6),
        original=between(0.18, 0.28),
        control=between(-0.02, 0.01),
    )
    assert found.word == FORGOTTEN and found.has_power
    for number in ("0.550", "+0.025", "+0.230", "-0.005", "±0.05", "within"):
        assert number in found.sentence, number
    blunt = verdict.judge_view(between(-0.01, 0.01), original=between(-0.1, 0.1))
    assert blunt.has_power is False and "no evidence" in blunt.sentence
    assert verdict.judge_view(between(-0.01, 0.01)).has_power is None


def test_a_method_is_as_bad_as_its_worst_view():
    words = [NOT_FORGOTTEN, OVER_FORGOTTEN, INCONCLUSIVE, FORGOTTEN]
    views = {word: verdict.Verdict(word, f"{word}: .", True) for word in words}
    for worst in words:
        left = {name: views[name] for name in reversed(words[words.index(worst) :])}
        found = verdict.combine_views(left)
        assert found.word == worst and found.sentence.startswith(f"{worst}: ")
    two = {
        "image": views[NOT_FORGOTTEN],
        "fused": views[NOT_FORGOTTEN],
        "text": views[FORGOTTEN],
    }
    assert "image (also fused)" in verdict.combine_views(two).sentence


def test_what_nobody_knows_of_a_view_is_not_left_out():
    tight, wide = between(-0.02, 0.03), between(-0.06, 0.2)
    telling = verdict.judge_view(tight, original=between(0.1, 0.3))
    assert (telling.word, telling.has_power) == (FORGOTTEN, True)
    # Neither the model nor the original is known to be apart, or not to be.
    unknown = verdict.judge_view(wide, original=wide)
    assert (unknown.word, unknown.has_power) == (INCONCLUSIVE, None)
    views = {"image": unknown, "pair": telling}
    assert verdict.combine_views(views).word == INCONCLUSIVE
    # There was surely nothing to be seen: no question.
    nothing = verdict.judge_view(wide, original=tight)
    assert (nothing.word, nothing.has_power) == (INCONCLUSIVE, False)
    assert verdict.combine_views({"image": nothing, "pair": telling}).word == FORGOTTEN


def test_a_view_without_memory_is_no_evidence_of_forgetting():
    blunt = verdict.Verdict(FORGOTTEN, "forgotten: .", False)
    good = verdict.Verdict(FORGOTTEN, "forgotten: .", True)
    over = verdict.Verdict(OVER_FORGOTTEN, "over-forgotten: .", False)
    assert verdict.combine_views({"text": blunt}).word == INCONCLUSIVE
    assert verdict.combine_views({"text": blunt, "image": good}).word == FORGOTTEN
    assert verdict.combine_views({"text": over, "image": good}).word == OVER_FORGOTTEN
    assert verdict.combine_views({}).word == INCONCLUSIVE


# --- models with known faults ---------------------------------------------------------


def judged(model, rows=400, seed=0, noise=0.3):
    """The verdict of a model that says `model(truth, rng)` of the rows it unlearned.

    Signals are how far the truth is ahead of the one other class.
    """
    rng = np.random.default_rng(seed)
    ease = [rng.normal(size=n) + 1 for n in (rows, 2 * rows)]
    labels = np.eye(2)[np.zeros(rows, int)]

    def said(of_members, of_others=lambda x: x):
        told = of_members(ease[0]), of_others(ease[1])
        return auc.Signals(*(x + noise * rng.normal(size=len(x)) for x in told))

    reference, control = said(lambda x: x), said(lambda x: x)
    original = said(lambda x: x + 1.5)
    mine = original if model == "original" else said(*model)
    logits = [np.stack([x[0], 0 * x[0]], axis=1) for x in (mine, reference)]
    return verdict.judge_view(
        auc.auc_difference(mine, reference),
        score_difference=scores.score_difference(logits[0], logits[1], labels, False),
        attack=auc.auc_interval(mine),
        original=auc.auc_difference(original, reference),
        control=auc.auc_difference(control, reference),
    )


@pytest.mark.parametrize("seed", range(5))
def test_models_with_known_faults_are_judged_so(seed):
    noise = np.random.default_rng(100 + seed)
    # Of random weights unlearned rows are as any others: the AUC is a half, as the
    # reference's is, and it is the score that tells.
    random = [lambda x: noise.normal(size=len(x))] * 2
    faults = {
        NOT_FORGOTTEN: ["original", (lambda x: x + 0.5,)],
        OVER_FORGOTTEN: [(lambda x: x - 1.5,), random],
    }
    for word, models in faults.items():
        for model in models:
            assert judged(model, seed=seed).word == word
    good = judged((lambda x: x,), rows=3000, seed=seed)
    assert good.word == FORGOTTEN and good.has_power
    few = judged((lambda x: x,), rows=20, seed=seed)
    assert few.word == INCONCLUSIVE


def test_a_model_that_remembers_a_fifth_is_judged_by_its_few_rows():
    rng = np.random.default_rng(0)
    ease = rng.normal(size=500), rng.normal(size=1000)
    reference, model = (
        auc.Signals(*(x + 0.3 * rng.normal(size=len(x)) for x in ease)) for _ in "ab"
    )
    clean = attacks.tpr_difference(model, reference, 0.01)
    assert verdict.judge_view(clean, metric="TPR @ 1 % FPR").word == FORGOTTEN
    model.members[:100] += 6
    found = attacks.tpr_difference(model, reference, 0.01)
    told = verdict.judge_view(found, metric="TPR @ 1 % FPR")
    assert told.word == NOT_FORGOTTEN and "TPR @ 1 % FPR" in told.sentence
    assert found.value == pytest.approx(0.2, abs=0.03)
    assert attacks.tpr_difference(model, reference, 0.0001) is None


def test_a_retrained_model_is_seldom_called_anything_worse():
    words = [judged((lambda x: x,), rows=200, seed=seed).word for seed in range(200)]
    # 5 % at most, on either side.
    assert words.count(NOT_FORGOTTEN) <= 9 and words.count(OVER_FORGOTTEN) <= 9
    assert words.count(FORGOTTEN) > 150


# --- how long it takes ----------------------------------------------------------------


@pytest.mark.slow
def test_all_audits_of_fifteen_thousand_rows_take_seconds():
    rows, classes, width, models = 15_552, 23, 256, 16
    rng = np.random.default_rng(0)
    labels = (rng.random((rows, classes)) < 0.11).astype(np.float32)
    one, two = rng.normal(size=(2, rows, classes)).astype(np.float32)
    x, y = rng.normal(size=(2, rows, width)).astype(np.float32)
    pool = rng.normal(size=(3, models, rows))
    single = np.eye(classes, dtype=np.float32)[rng.integers(classes, size=rows)]
    half = rng.random(rows) < 0.5
    before = peak()
    start = time.perf_counter()
    for multi_label, truth in ((True, labels), (False, single)):
        told = [attacks.membership_signals(z, truth, multi_label) for z in (one, two)]
        for name in told[0]:
            pair = [auc.Signals(s[name][half], s[name][~half]) for s in told]
            assert auc.auc_interval(pair[0]) and auc.auc_difference(*pair)
            assert auc.auc_bootstrap(pair[0])
            assert attacks.tpr_at_fpr(pair[0], 0.001)
            assert attacks.tpr_difference(pair[0], pair[1], 0.01)
            assert epsilon.threshold_epsilon(pair[0]) is not None
            assert epsilon.one_run_audit(told[0][name], half) is not None
        for distance in ("js_divergence", "agreement", "activation_distance"):
            values = getattr(distances, distance)(one, two, multi_label)
            assert mean_interval(values, bounds=(0, 5))
    assert jackknife_interval(scores.mean_average_precision, one, labels)
    assert jackknife_interval(scores.macro_auroc, one, labels)
    assert distances.cka_interval(x, y)
    assert jackknife_interval(distances.scatter_ratio, x, labels)
    assert distances.intra_class_similarity(x, y, labels)
    role = rng.integers(3, size=(models, rows))
    pooled = shadow.lira_leave_one_out(pool[0], role == 0, role == 1)
    assert shadow.evaluate_pool(pooled, role == 0).auc
    chance = membership.true_probability(one, labels, True)
    references = rng.random((models, rows))
    found = shadow.rmia(chance, references, chance, references)
    assert shadow.evaluate_attack(found, half, threshold=None).auc
    assert forgetting.forgetting_score(*pool).models == models
    assert forgetting.klom(*pool).models == models
    taken = time.perf_counter() - start
    print(f"{taken:.1f} s, {(peak() - before) / 2**20:.0f} MiB more")
    assert taken < 60
    assert peak() - before < 2**30


def peak() -> int:
    """The most memory this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
