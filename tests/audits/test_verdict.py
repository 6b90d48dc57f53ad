"""Verdicts follow from intervals."""

import numpy as np
import pytest

from ccu_jax.audits.verdict import (
    FORGOTTEN,
    INCONCLUSIVE,
    NOT_FORGOTTEN,
    OVER_FORGOTTEN,
    Verdict,
    classify,
    combine_views,
    judge_view,
)
from ccu_jax.metrics.classification import score_difference
from ccu_jax.metrics.intervals import Interval
from ccu_jax.metrics.roc import Signals, auc_difference


def interval(low, high):
    return Interval((low + high) / 2, low, high)


@pytest.mark.parametrize(
    "low, high, word",
    [
        (-0.02, 0.03, FORGOTTEN),
        (0.01, 0.04, FORGOTTEN),  # significant, but within the tolerance
        (-0.05, 0.05, FORGOTTEN),
        (0.0, 0.0, FORGOTTEN),
        (0.01, 0.06, NOT_FORGOTTEN),
        (0.2, 0.3, NOT_FORGOTTEN),
        (-0.01, 0.06, INCONCLUSIVE),  # not significant, but not within the tolerance
        (-0.2, 0.2, INCONCLUSIVE),
        (0.0, 0.2, INCONCLUSIVE),
        (float("nan"), float("nan"), INCONCLUSIVE),
    ],
)
def test_verdict_follows_from_the_interval(low, high, word):
    assert classify(interval(low, high)) == word
    mirror = {NOT_FORGOTTEN: OVER_FORGOTTEN}.get(word, word)
    assert classify(interval(-high, -low)) == mirror


@pytest.mark.parametrize(
    "difference, score, excess, word",
    [
        ((-0.01, 0.01), (-0.5, -0.4), None, OVER_FORGOTTEN),
        ((-0.01, 0.01), (-0.2, -0.01), None, FORGOTTEN),
        # Better than the reference on all images alike is no memorization.
        ((-0.01, 0.01), (0.1, 0.2), None, FORGOTTEN),
        ((-0.01, 0.01), None, (0.1, 0.2), NOT_FORGOTTEN),
        ((-0.01, 0.01), None, (-0.5, -0.4), FORGOTTEN),
        ((-0.01, 0.01), None, (-0.2, -0.01), FORGOTTEN),
        ((0.1, 0.2), (-0.5, -0.4), None, NOT_FORGOTTEN),  # the worse of two verdicts
        (None, (-0.5, -0.4), None, OVER_FORGOTTEN),
        (None, None, None, INCONCLUSIVE),
    ],
)
def test_scores_count_beyond_the_tolerance(difference, score, excess, word):
    values = [x and interval(*x) for x in (difference, score, excess)]
    verdict = judge_view(values[0], score_difference=values[1], score_excess=values[2])
    assert verdict.word == word
    assert all(x is None or f"{x.value:+.3f}" in verdict.sentence for x in values)
    assert ("not measured" in verdict.sentence) == (difference is None)


def test_the_sentence_has_all_numbers():
    values = {"attack": (0.5, 0.6), "original": (0.18, 0.28), "control": (-0.02, 0.01)}
    values = {name: interval(*limits) for name, limits in values.items()}
    verdict = judge_view(interval(0.01, 0.04), "TPR", **values)
    assert verdict.word == FORGOTTEN and verdict.has_power
    numbers = ("TPR 0.550", "+0.025", "+0.230", "-0.005", "±0.05", "significant, but")
    assert all(text in verdict.sentence for text in numbers)


@pytest.mark.parametrize(
    "difference, original, word, has_power",
    [
        ((-0.02, 0.03), (0.1, 0.3), FORGOTTEN, True),
        ((-0.02, 0.03), (-0.1, 0.1), FORGOTTEN, False),
        ((-0.02, 0.03), None, FORGOTTEN, None),
        ((-0.06, 0.2), (-0.02, 0.03), INCONCLUSIVE, False),
        # Unknown whether the attack would detect memorization in the original.
        ((-0.06, 0.2), (-0.06, 0.2), INCONCLUSIVE, None),
    ],
)
def test_an_attack_has_power_if_it_detects_memorization_in_the_original(
    difference, original, word, has_power
):
    original = original and interval(*original)
    verdict = judge_view(interval(*difference), original=original)
    assert (verdict.word, verdict.has_power) == (word, has_power)
    assert ("no evidence" in verdict.sentence) == (has_power is False)


def test_a_method_has_the_verdict_of_its_worst_view():
    words = [NOT_FORGOTTEN, OVER_FORGOTTEN, INCONCLUSIVE, FORGOTTEN]
    views = {word: Verdict(word, f"{word}: .", True) for word in words}
    for rank, worst in enumerate(words):
        verdict = combine_views({name: views[name] for name in reversed(words[rank:])})
        assert verdict.word == worst and verdict.sentence.startswith(f"{worst}: ")
    both = {"image": views[INCONCLUSIVE], "fused": views[INCONCLUSIVE]}
    assert "image (also fused): inconclusive" in combine_views(both).sentence


@pytest.mark.parametrize(
    "views, word",
    [
        ({"text": (FORGOTTEN, False)}, INCONCLUSIVE),
        ({"text": (FORGOTTEN, False), "image": (FORGOTTEN, True)}, FORGOTTEN),
        ({"text": (INCONCLUSIVE, False), "image": (FORGOTTEN, True)}, FORGOTTEN),
        ({"text": (INCONCLUSIVE, None), "image": (FORGOTTEN, True)}, INCONCLUSIVE),
        ({"text": (OVER_FORGOTTEN, False), "image": (FORGOTTEN, True)}, OVER_FORGOTTEN),
        ({}, INCONCLUSIVE),
    ],
)
def test_views_without_power_do_not_count_unless_they_find_something(views, word):
    verdicts = {name: Verdict(x, f"{x}: .", y) for name, (x, y) in views.items()}
    assert combine_views(verdicts).word == word


def judge_retrained_model(num_rows, seed, noise=0.3):
    """Judges a model that differs from the reference by noise alone."""
    rng = np.random.default_rng(seed)
    truth = [rng.normal(size=n) + 1 for n in (num_rows, 2 * num_rows)]
    original, reference, model = (
        Signals(*(x + noise * rng.normal(size=len(x)) for x in truth)) for _ in range(3)
    )
    logits = [np.stack([x.members, 0 * x.members], axis=1) for x in (model, reference)]
    labels = np.eye(2)[np.zeros(num_rows, int)]
    original = original._replace(members=original.members + 1.5)
    return judge_view(
        auc_difference(model, reference),
        score_difference=score_difference(logits[0], logits[1], labels, False),
        original=auc_difference(original, reference),
    ).word


def test_a_retrained_model_is_rarely_called_worse_than_forgotten():
    words = [judge_retrained_model(200, seed) for seed in range(200)]
    # At most 2.5 % on either side, plus the error of 200 samples.
    assert words.count(NOT_FORGOTTEN) <= 9 and words.count(OVER_FORGOTTEN) <= 9
    assert words.count(FORGOTTEN) > 150
    few_rows = {judge_retrained_model(20, seed) for seed in range(5)}
    assert few_rows == {INCONCLUSIVE}
