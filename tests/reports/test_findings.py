"""Findings state what the rows contain, and nothing that was not measured."""

import math

import pytest

from ccu_jax.reports.findings import collect_findings
from ccu_jax.reports.tables import make_method_table
from tests.reports.conftest import make_row


def texts(rows, *kinds):
    """Returns the sentences of some kinds, or of all."""
    return [x.text for x in collect_findings(rows) if not kinds or x.kind in kinds]


def test_best_baselines_are_named_with_score_difference_and_time(good_rows):
    rows = [*good_rows, *(make_row("salun", s, fused=0.5, auc=0.51) for s in (0, 1))]
    best, forgetting = (t for t in texts(rows) if t.startswith("Best baseline"))
    assert "scrub (61.5 ± 6.4 %)" in best and "time 25.0 ± 0.0 %" in best
    # Differences 4 and 5 points: half-width 12.7062 * sqrt(0.5) / sqrt(2) = 6.35.
    assert "+4.5 points (95 % CI -1.9 to +10.9, 2 paired seeds)" in best
    assert "whose attack AUCs match retrain_visual's: salun" in forgetting
    (text,) = (t for t in texts(rows) if t.startswith("ccu_plus vs retrain_visual"))
    assert "time 5.00 ± 0.00 %" in text


def test_divergence_is_reported(good_rows):
    rows = [*good_rows, make_row("scrub", 2, fused=0.99, diverged="step 40: loss nan")]
    (text,) = texts(rows, "failed")
    assert text.startswith("scrub diverged (seed 2): step 40: loss nan")
    assert any("fused test score: finetune (60.0" in text for text in texts(rows))
    assert "| scrub (diverged) |" in make_method_table(rows).to_markdown()


@pytest.mark.parametrize(
    "changes, claim",
    [
        ({"auc": 0.60}, "image attack AUC"),
        ({"auc": 0.40}, "fused attack AUC"),  # lower than the reference's is no better
        ({"text_unchanged": False}, "unchanged to the bit: failed (in 0 of 2 seeds)"),
        ({"fused": 0.5}, "fused test score is at least retrain_visual's: failed"),
        ({"attack_auc": {}}, "(not measured)"),
        ({"attack_auc": {"image": math.nan, "fused": None}}, "(not measured)"),
        ({"scores": {}}, "(not measured)"),
        ({"unlearn_s": 10.5}, "at most 10 % of retrain_visual's time: failed (10.5 %)"),
    ],
)
def test_a_missed_target_fails(good_rows, changes, claim):
    rows = [make_row("ccu_plus", seed, **changes) for seed in (0, 1)]
    rows += [row for row in good_rows if row["method"] != "ccu_plus"]
    failed = texts(rows, "failed")
    assert any(claim in text for text in failed), failed


@pytest.mark.parametrize(
    "image, text, fused, auc, claim",
    [
        (0.3, 0.3, 0.7, 0.64, "image attack AUC at least 0.65: failed (0.640)"),
        (math.nan, 0.3, 0.7, 0.9, "or text alone: failed (not measured)"),
        (0.3, 0.71, 0.7, 0.9, "or text alone: failed (70.0 % and 30.0 %, 71.0 %)"),
    ],
)
def test_an_unsuitable_original_fails(image, text, fused, auc, claim):
    scores = zip(("image", "text", "fused"), (image, text, fused), strict=True)
    scores = {"test": {view: {"accuracy": x} for view, x in scores}}
    rows = [make_row("original", scores=scores, auc=auc), make_row("retrain_visual")]
    assert any(claim in t for t in texts(rows, "failed") if t.startswith("original"))


@pytest.mark.parametrize("count, result", [(120, "failed"), (75, "passed")])
def test_a_small_unlearn_set_has_a_larger_tolerance(good_rows, count, result):
    for row in good_rows:
        row["unlearn_set"]["count"] = count
        if row["method"] == "ccu_plus":
            row["attack_auc"] = dict.fromkeys(row["attack_auc"], 0.56)
    (text,) = (t for t in texts(good_rows) if "image attack AUC is within" in t)
    assert f": {result} (0.560 and 0.520" in text


@pytest.mark.parametrize("count, kind", [(150, "info"), (12, "warning")])
def test_standard_error_of_the_attack_is_stated(count, kind):
    rows = [make_row("original"), make_row("retrain_visual")]
    for row in rows:
        row["unlearn_set"]["images"], row["counts"] = count, {"unseen": 300}
    (text,) = (text for text in texts(rows, kind) if "standard error" in text)
    error = math.sqrt((count + 301) / (12 * count * 300))
    assert f"about {error:.3f}" in text and ("Too few" in text) == (kind == "warning")


def test_without_reference_its_comparisons_are_left_out():
    rows = [make_row("original"), make_row("ccu_plus")]
    failed = texts(rows, "failed")
    assert any("is not in this run" in text for text in failed)
    assert not any("ccu_plus" in text or "not measured" in text for text in failed)
    assert any("unchanged to the bit: passed" in text for text in texts(rows, "passed"))
    (text,) = (text for text in texts(rows) if "Validation rows" in text)
    assert "of ccu_plus, so" in text


def test_met_targets_pass_and_those_of_a_missing_method_are_left_out(good_rows):
    assert len(texts(good_rows, "passed")) == 8 and not texts(good_rows, "failed")
    rows = [row for row in good_rows if row["method"] != "ccu_plus"]
    assert not texts(rows, "failed")
    assert all(text.startswith("original") for text in texts(rows, "passed"))


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        ({"edition": "sample"}, "warning", "generated by this program in the official"),
        ({"edition": "clipart"}, "warning", "1,408 public-domain drawings"),
        ({"edition": "official"}, "info", "Edition: official."),
        ({"unlearn_set": {"rule": "memorized:0"}}, "info", "selected by the original"),
        ({"unlearn_set": {"rule": "group:Ann"}}, "info", "were drawn at random"),
        ({"unlearn_set": {"rule": "ids:list.txt"}}, "info", "were drawn at random"),
        ({"features": "stored"}, "info", "Methods that train on cached features (ccu)"),
        ({"requests": [{}]}, "info", "Requests were unlearned one after another"),
    ],
)
def test_limits_of_the_numbers_are_stated(changes, kind, text):
    assert any(text in x for x in texts([make_row("ccu", **changes)], kind))
    changed = {"edition": "own"} | dict.fromkeys(changes)
    assert not any(text in x for x in texts([make_row("ccu", **changed)]))
