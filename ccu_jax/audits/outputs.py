"""All audits that need nothing but the stored outputs of a model and its references."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from ccu_jax.audits import attacks, auc, distances, epsilon, scores, verdict
from ccu_jax.audits.intervals import (
    Interval,
    hull,
    jackknife,
    mean_interval,
    over_seeds,
    plain,
)
from ccu_jax.evaluate import Results
from ccu_jax.models import VIEWS

# The views by which a model is judged; the others are told of. A model that remembers
# few rows, but these well, is seen by how many are found at few false alarms, and one
# that has fallen apart by its score in two views. Six questions are asked at once, so
# each interval that a verdict hangs on is of a confidence of 1 - .05 / 6.
JUDGED = ("image", "fused", "pair")
JUDGED_BY = {"image": "loss", "fused": "loss", "pair": "cosine"}
SINGLE = "single pictures"
LEVEL = 1 - 0.05 / 6
RATES = {"tpr_1": 0.01, "tpr_01": 0.001}
_COMPARED = ("retain", "unlearn", "test")
_RANKED = {
    "mean_average_precision": scores.mean_average_precision,
    "macro_auroc": scores.macro_auroc,
}
_GROUPS = 10  # of rows that are left out in turn, for an interval
# What is less the reference's, and of whose outputs.
_AGAINST = {"difference": "model", "original": "original", "control": "control"}


class Given(NamedTuple):
    """Outputs on the same rows: the model, and what it is compared with.

    `control`: of a second reference. None: there is none.
    """

    model: Results
    original: Results | None
    reference: Results | None
    control: Results | None


def audit(given: Given) -> dict[str, Any]:
    """Everything that outputs tell, as plain JSON; intervals are `[value, low, high]`.

    Raises:
        ValueError: the outputs are not of the same rows.
    """
    for other in (given.original, given.reference, given.control):
        if other is not None and (other.id != given.model.id).any():
            raise ValueError("outputs of other rows cannot be compared")
    members = "\n".join(sorted(given.model.id[given.model.of == "unlearn"].tolist()))
    return {
        "members": hashlib.sha256(members.encode()).hexdigest()[:16],
        "attacks": attacked(given),
        "scores": ranked(given.model),
        "score_difference": {view: _score(given, view) for view in VIEWS},
        "gaps": gaps(given.model, given.reference),
        "distances": apart(given.model, given.reference),
        "epsilon": least_epsilon(given.model),
    }


def attacked(given: Given) -> dict[str, dict[str, dict[str, Any]]]:
    """By view and signal: the attack's AUC and rates, and the AUC less the reference's.

    `{view: {signal: {"auc", "difference", "original", "control", "tpr_1", "tpr_01"}}}`,
    and of the judged signals the AUC's `bootstrap`;
    "original" and "control" are those models' differences from the reference, and
    `tpr_1_difference` and so on the same of the rate at 1 % false alarms.
    """
    own = signals_of(given.model)
    others = {
        name: None if model is None else signals_of(model)
        for name, model in given._asdict().items()
    }

    def one(view, name):
        mine = own[view][name]
        told = {"auc": auc.auc_interval(*mine, confidence=LEVEL), "bootstrap": None}
        if name == JUDGED_BY.get(view):
            told["bootstrap"] = auc.auc_bootstrap(*mine)
        for key, rate in RATES.items():
            told[key] = attacks.tpr_at_fpr(*mine, rate, confidence=LEVEL)
        for key, whose in _AGAINST.items():
            models = others[whose], others["reference"]
            told[key] = told[f"tpr_1_{key}"] = None
            if None not in models:
                sides = [side for model in models for side in model[view][name]]
                told[key] = auc.auc_difference(*sides, confidence=LEVEL)
                told[f"tpr_1_{key}"] = attacks.tpr_difference(
                    *sides, RATES["tpr_1"], confidence=LEVEL
                )
        return {key: plain(value) for key, value in told.items()}

    return {view: {name: one(view, name) for name in own[view]} for view in own}


def signals_of(model: Results) -> dict[str, dict[str, tuple]]:
    """`{view: {signal: (of members, of others)}}`, of rows that have a picture."""
    found: dict[str, dict[str, tuple]] = {}

    def split(view, values):
        shown = model.shown(view) & model.has_image
        return tuple(values[shown & (model.of == of)] for of in ("unlearn", "unseen"))

    for view in VIEWS:
        signals = attacks.signals(model.logits[view], model.labels, model.multi_label)
        found[view] = {name: split(view, values) for name, values in signals.items()}
    found["pair"] = {"cosine": split("pair", model.pair)}
    if model.white is not None:
        found["white"] = {"ridge": split("white", model.white)}
    return found


def ranked(model: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """By set and view: mean average precision, macro AUROC, and how right rows are.

    `right` is the accuracy, with several labels the F1 score of a row's labels.
    """

    def one(of, view):
        rows = (model.of == of) & model.shown(view)
        logits, labels = model.logits[view][rows], model.labels[rows]
        right = None
        if len(logits) and np.isfinite(logits).all():
            each = scores.by_row(logits, labels, model.multi_label)
            right = mean_interval(each, bounds=(0, 1))
        found = {
            name: jackknife(score, logits, labels, groups=_GROUPS)
            for name, score in _RANKED.items()
        }
        return {name: plain(x) for name, x in (found | {"right": right}).items()}

    return {of: {v: one(of, v) for v in VIEWS} for of in ("unlearn", "unseen", "test")}


def _score(given, view):
    """The score of the unlearn set less the reference's, row by row."""
    if given.reference is None:
        return None
    rows = (given.model.of == "unlearn") & given.model.shown(view)
    logits = (x.logits[view][rows] for x in (given.model, given.reference))
    return plain(
        scores.score_difference(
            *logits,
            given.model.labels[rows],
            given.model.multi_label,
            confidence=LEVEL,
        )
    )


def gaps(model: Results, reference: Results | None) -> dict[str, float | None]:
    """Average gap (points) and Tug-of-War, both forms, of the image view."""
    if reference is None:
        return {"average_gap": None, "tug_of_war": None, "tug_of_war_attack": None}
    mine, theirs = (_shares(x) for x in (model, reference))
    return {
        "average_gap": scores.average_gap(mine, theirs),
        "tug_of_war": scores.tug_of_war(mine, theirs),
        "tug_of_war_attack": scores.tug_of_war(mine, theirs, scores.TUG_ATTACK),
    }


def _shares(model):
    found: dict[str, float | None] = {}
    for of in _COMPARED:
        rows = (model.of == of) & model.shown("image")
        logits, labels = model.logits["image"][rows], model.labels[rows]
        known = len(logits) and np.isfinite(logits).all()
        right = scores.by_row(logits, labels, model.multi_label) if known else None
        found[of] = None if right is None else float(right.mean())
    told = auc.auc_interval(*signals_of(model)["image"]["loss"])
    return found | {"attack": None if told is None else told.value}


def apart(model: Results, reference: Results | None) -> dict[str, Any]:
    """How far predictions are from the reference's, by set and view."""
    if reference is None:
        return {}

    def one(of, view):
        rows = (model.of == of) & model.shown(view)
        pair = model.logits[view][rows], reference.logits[view][rows]
        if not all(np.isfinite(x).all() for x in pair):
            return {}
        multi_label = model.multi_label
        most = np.sqrt(model.labels.shape[1] if multi_label else 2)
        measures = {
            "js_divergence": (distances.js_divergence, 1.0),
            "agreement": (distances.agreement, 1.0),
            "activation_distance": (distances.activation_distance, float(most)),
        }
        return {
            name: plain(mean_interval(measure(*pair, multi_label), bounds=(0, top)))
            for name, (measure, top) in measures.items()
        }

    return {of: {v: one(of, v) for v in VIEWS} for of in ("unlearn", "test")}


def least_epsilon(model: Results) -> dict[str, float | None]:
    """Epsilon at least, by the best threshold on each view; all at once with 95 %."""
    found = signals_of(model)
    return {
        view: epsilon.threshold_epsilon(
            *found[view][JUDGED_BY[view]], confidence=1 - 0.05 / len(JUDGED)
        )
        for view in JUDGED
    }


def judged(
    records: list[dict[str, Any]], tolerance: float, is_reference: bool = False
) -> dict[str, Any]:
    """The verdict on a method from its records of all seeds: by view, and together.

    Args:
        records: of `audit`, one for each seed, with `diverged` of its row.
        tolerance: how far an AUC or a score may be from the reference's.
        is_reference: whether it is what all are compared with.
    """
    broken = [record["diverged"] for record in records if record.get("diverged")]
    if is_reference or broken:
        word = f"diverged: {broken[0]}" if broken else "the reference"
        none = dict.fromkeys(JUDGED)
        said = verdict.Verdict(word.partition(":")[0], word)
        return {"views": {}, "differences": none, **said._asdict()}
    # Of other rows in each seed errors even out over seeds; of the same they do not.
    shared = len({record["members"] for record in records}) < len(records)
    views, from_what = {}, {}
    for view in JUDGED:
        told = [record["attacks"][view][JUDGED_BY[view]] for record in records]

        def over(key, told=told):
            return _over([_interval(x[key]) for x in told], shared)

        by_score = None
        if view in VIEWS:
            each = [_interval(record["score_difference"][view]) for record in records]
            by_score = _over(each, shared)
        from_what[view] = over("difference")
        views[view] = verdict.verdict(
            from_what[view],
            score_difference=by_score,
            model=over("auc"),
            original_difference=over("original"),
            control=over("control"),
            tolerance=tolerance,
        )
    told = [record["attacks"]["image"]["loss"] for record in records]
    views |= _single(told, tolerance, shared)
    return {
        "views": {view: found._asdict() for view, found in views.items()},
        "differences": {view: plain(found) for view, found in from_what.items()},
        **verdict.combined(views)._asdict(),
    }


def _over(intervals, shared: bool) -> Interval | None:
    """One interval of those of all seeds."""
    found = over_seeds(intervals, confidence=LEVEL)
    if not shared or found is None:
        return found
    mean = Interval(*np.mean([list(x) for x in intervals], axis=0).tolist())
    return hull(mean, found)


def _single(told, tolerance, shared):
    """The verdict by single rows, where there are enough unseen ones to tell."""

    def over(key):
        return _over([_interval(x[key]) for x in told], shared)

    if over("tpr_1_difference") is None:
        return {}
    return {
        SINGLE: verdict.verdict(
            over("tpr_1_difference"),
            model=over("tpr_1"),
            original_difference=over("tpr_1_original"),
            control=over("tpr_1_control"),
            tolerance=tolerance,
            what="TPR at 1 % FPR",
        )
    }


def _interval(told) -> Interval | None:
    return None if told is None else Interval(*told)
