"""Verdicts on unlearning: forgotten, not forgotten, over-forgotten or inconclusive.

The evidence is a difference: the AUC of a membership attack on the model minus its AUC
on a reference that was retrained without the images, on the same rows. One confidence
interval of this difference serves two tests:

* equivalence (TOST, Schuirmann 1987): the interval lies within ±TOLERANCE;
* difference: the interval does not contain zero.

Equivalence takes precedence: a difference that is significant but within the tolerance
counts as forgotten. If neither test succeeds, as with few rows, the verdict is
inconclusive: the lack of a significant difference never suffices for "forgotten".

A model that predicts at random treats unlearned and unseen rows alike, so its attack
AUC equals the reference's. Therefore the scores count as well: a model is
over-forgotten if its score on the unlearn set is below the reference's by more than the
tolerance, and not forgotten if that difference exceeds the one on unseen rows by more
than the tolerance. A model that scores higher on all images reveals no membership, so
equal scores are not required for "forgotten".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ccu_jax.audits.offline import CONFIDENCE, DIFFERENCES, VERDICT_SIGNALS
from ccu_jax.methods import REFERENCE
from ccu_jax.metrics.intervals import Interval, mean_over_seeds, to_list
from ccu_jax.models import VIEWS

TOLERANCE = 0.05  # of differences of AUCs, rates and scores
FORGOTTEN = "forgotten"
NOT_FORGOTTEN = "not forgotten"
OVER_FORGOTTEN = "over-forgotten"
INCONCLUSIVE = "inconclusive"
# A method has the worst verdict of its views. Over-forgetting reveals that an image was
# in the training set, but not what it shows.
_WORST_FIRST = (NOT_FORGOTTEN, OVER_FORGOTTEN, INCONCLUSIVE, FORGOTTEN)
LOW_FPR = "low FPR"  # the view that is judged by the attack's TPR instead of its AUC


class Verdict(NamedTuple):
    """A verdict and a sentence with the measurements behind it.

    `has_power`: whether the attack detects memorization in the original. If not, an
    attack that detects none in the model proves nothing. None if unknown.
    """

    word: str
    sentence: str
    has_power: bool | None = None


def classify(difference: Interval | None) -> str:
    """Returns the verdict for the confidence interval of one metric difference."""
    if difference is None or not difference.low <= difference.high:
        return INCONCLUSIVE
    if max(-difference.low, difference.high) <= TOLERANCE:
        return FORGOTTEN
    if difference.low > 0:
        return NOT_FORGOTTEN
    return OVER_FORGOTTEN if difference.high < 0 else INCONCLUSIVE


def judge_view(
    difference: Interval | None,
    metric: str = "AUC",
    *,
    attack: Interval | None = None,
    original: Interval | None = None,
    control: Interval | None = None,
    score_difference: Interval | None = None,
    score_excess: Interval | None = None,
) -> Verdict:
    """Returns the verdict for one attack on one view, the worst of up to three tests.

    Args:
        difference: the attack's metric on the model minus that on the reference, paired
            by row (`roc.auc_difference`), not the difference of two intervals.
        metric: the display name of the metric.
        attack: the metric of the attack on the model.
        original: the same as `difference` for the original model.
        control: the same as `difference` for a second reference.
        score_difference: the unlearn-set score of the model minus the reference's.
        score_excess: `score_difference` minus the same difference on unseen rows.
    """
    words = [classify(difference)]
    if score_difference is not None and score_difference.high < -TOLERANCE:
        words.append(OVER_FORGOTTEN)
    if score_excess is not None and score_excess.low > TOLERANCE:
        words.append(NOT_FORGOTTEN)
    word = min(words, key=_WORST_FIRST.index)
    has_power = None if original is None else original.low > 0 or original.high < 0
    if has_power is False and word == INCONCLUSIVE and classify(original) != FORGOTTEN:
        has_power = None  # too few rows: the original is inconclusive as well
    measured = {
        f"attack {metric}": format_interval(attack, ".3f"),
        f"Δ {metric} vs reference": _format_difference(difference),
        "Δ unlearn-set score vs reference": format_interval(score_difference),
        "Δ unlearn-set score minus Δ unseen score": format_interval(score_excess),
        f"Δ {metric} of the original": format_interval(original),
        f"Δ {metric} of the second reference": format_interval(control),
    }
    parts = [f"{name} {numbers}" for name, numbers in measured.items() if numbers]
    if has_power is False:
        reason = "the attack does not detect memorization in the original either"
        parts.append(f"no evidence, because {reason}")
    return Verdict(word, f"{word}: {'; '.join(parts)}", has_power)


def combine_views(views: Mapping[str, Verdict]) -> Verdict:
    """Returns a method's verdict, the worst of its views.

    Views in which the attack has no power and finds nothing do not count; if no other
    view is left, the verdict is inconclusive. A view that is inconclusive for the
    original as well counts.
    """
    counted = {
        name: view
        for name, view in views.items()
        if view.word in (NOT_FORGOTTEN, OVER_FORGOTTEN) or view.has_power is not False
    }
    if not counted:
        reason = "the attack detects no memorization in any view of the original"
        return Verdict(INCONCLUSIVE, f"{INCONCLUSIVE}: {reason}", False)
    word = min((view.word for view in counted.values()), key=_WORST_FIRST.index)
    names = [name for name, view in counted.items() if view.word == word]
    also = f" (also {', '.join(names[1:])})" if len(names) > 1 else ""
    worst = counted[names[0]]
    return worst._replace(sentence=f"{names[0]}{also}: {worst.sentence}")


def verdict_over_seeds(
    records: Sequence[dict[str, Any]], is_reference: bool = False
) -> dict[str, Any]:
    """Returns a method's verdict as plain JSON.

    It has the fields of `Verdict`, `views` with the same by view, and `differences`
    with the interval of the AUC difference by view. `records` are those of
    `offline.audit_outputs`, one per seed, with `diverged` of its result.
    """
    reasons = [record["diverged"] for record in records if record.get("diverged")]
    views: dict[str, Verdict] = {}
    differences: dict[str, Interval | None] = dict.fromkeys(VERDICT_SIGNALS)
    if reasons:
        verdict = Verdict("diverged", f"diverged: {reasons[0]}")
    elif is_reference:
        verdict = Verdict("reference", "reference")
    elif not all(record["compared"] for record in records):
        remedy = f"no {REFERENCE} to compare with; add it to --methods"
        verdict = Verdict(INCONCLUSIVE, f"{INCONCLUSIVE}: {remedy}")
    else:
        views, differences = _judge_views(records)
        verdict = combine_views(views)
    return {
        "views": {name: view._asdict() for name, view in views.items()},
        "differences": {view: to_list(x) for view, x in differences.items()},
        **verdict._asdict(),
    }


def _judge_views(
    records: Sequence[dict[str, Any]],
) -> tuple[dict[str, Verdict], dict[str, Interval | None]]:
    """Returns two dicts keyed by view: the verdict and the AUC difference."""
    is_shared = seeds_share_rows(records)

    def pool(values: Iterable[list[float] | None]) -> Interval | None:
        return mean_over_seeds(
            [None if value is None else Interval(*value) for value in values],
            confidence=CONFIDENCE,
            has_shared_rows=is_shared,
            bounds=(-1, 1),
        )

    def pool_attack(view: str, metric: str, prefix: str) -> dict[str, Interval | None]:
        attacks = [record["attacks"][view][VERDICT_SIGNALS[view]] for record in records]
        keys = {"attack": metric, **{name: prefix + name for name in DIFFERENCES}}
        return {name: pool(x[key] for x in attacks) for name, key in keys.items()}

    views, differences = {}, {}
    for view in VERDICT_SIGNALS:
        pooled: dict[str, Any] = pool_attack(view, "auc", "")
        differences[view] = pooled["difference"]
        for name in ("score_difference", "score_excess") if view in VIEWS else ():
            pooled[name] = pool(record[name][view] for record in records)
        views[view] = judge_view(**pooled)
    pooled = pool_attack("image", "tpr_1", "tpr_1_")
    if pooled["difference"] is not None:  # None: too few unseen rows
        views[LOW_FPR] = judge_view(metric="TPR @ 1 % FPR", **pooled)
    return views, differences


def seeds_share_rows(records: Sequence[dict[str, Any]]) -> bool:
    """Returns whether seeds share an unlearn set, so that errors do not average out."""
    return len({record["members"] for record in records}) < len(records)


def format_interval(interval: Sequence[float] | None, spec: str = "+.3f") -> str:
    """Formats an interval as "+0.010 (-0.020 to +0.040)"; "" if it is None."""
    if interval is None:
        return ""
    value, low, high = (format(x, spec) for x in interval)
    return f"{value} ({low} to {high})"


def _format_difference(difference: Interval | None) -> str:
    if difference is None:
        return "not measured"
    text = f"{format_interval(difference)}, tolerance ±{TOLERANCE}"
    is_significant = not difference.low <= 0 <= difference.high
    if is_significant and classify(difference) == FORGOTTEN:
        text += " (significant, but within the tolerance)"
    return text
