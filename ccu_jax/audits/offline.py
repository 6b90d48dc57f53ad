"""Measurements that need only the stored outputs of a model and its references."""

import hashlib
import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ccu_jax.evaluate.predictions import Predictions
from ccu_jax.metrics import classification, distances
from ccu_jax.metrics.intervals import jackknife_interval, mean_interval, to_list
from ccu_jax.metrics.membership import membership_signals
from ccu_jax.metrics.privacy import threshold_epsilon
from ccu_jax.metrics.roc import (
    Signals,
    auc_bootstrap,
    auc_difference,
    auc_interval,
    tpr_at_fpr,
    tpr_difference,
)
from ccu_jax.models import VIEWS

# The attacks that a verdict is based on, by view.
VERDICT_SIGNALS = {"image": "loss", "fused": "loss", "pair": "cosine"}
# A verdict tests six differences: three AUCs, two scores and the TPR at 1 % FPR.
CONFIDENCE = 1 - 0.05 / 6
_FPRS = {"tpr_1": 0.01, "tpr_01": 0.001}
_NUM_FOLDS = 10  # of the jackknife
_RANKING_SCORES = {
    "mean_average_precision": classification.mean_average_precision,
    "macro_auroc": classification.macro_auroc,
}
# Each with its greatest possible value.
_GAPS = {
    "average_gap": (classification.average_gap, 100),
    "tug_of_war": (classification.tug_of_war, 1),
    "tug_of_war_attack": (
        partial(classification.tug_of_war, names=classification.TOW_ATTACK),
        1,
    ),
}
# Keys of differences from the reference, and the models they are of.
_DIFFERENCES = {"difference": "model", "original": "original", "control": "control"}


class AuditInputs(NamedTuple):
    """Outputs on the same rows, of a model and of the models it is compared with.

    `control` is a second reference.
    """

    model: Predictions
    original: Predictions | None
    reference: Predictions | None
    control: Predictions | None


def audit_outputs(inputs: AuditInputs) -> dict[str, Any]:
    """Returns all measurements as plain JSON; intervals are `[value, low, high]`.

    What cannot be measured is None. `members` identifies the unlearn set, `compared`
    is whether there is a reference, `costs_s` the seconds of each measurement.

    Raises:
        ValueError: the outputs are not of the same rows.
    """
    model, reference = inputs.model, inputs.reference
    for other in inputs[1:]:
        if other is not None and (other.id != model.id).any():
            raise ValueError("outputs of different rows cannot be compared")
    members = "\n".join(sorted(model.id[model.split == "unlearn"].tolist()))
    record: dict[str, Any] = {
        "members": hashlib.sha256(members.encode()).hexdigest()[:16],
        "compared": reference is not None,
        "costs_s": {},
    }
    measurements = {
        "attacks": lambda: attack_results(inputs),
        "scores": lambda: ranking_scores(model),
        "score_difference": lambda: {
            view: score_difference(model, reference, view) for view in VIEWS
        },
        "score_excess": lambda: {
            view: score_excess(model, reference, view) for view in VIEWS
        },
        "gaps": lambda: gaps(model, reference),
        "distances": lambda: prediction_distances(model, reference),
        "epsilon": lambda: epsilon_lower_bounds(model),
    }
    for name, measure in measurements.items():
        start = time.perf_counter()
        record[name] = measure()
        record["costs_s"][name] = time.perf_counter() - start
    return record


def attack_results(inputs: AuditInputs) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the results of each attack by view and signal.

    `auc`, `tpr_1` and `tpr_01` (at 1 % and 0.1 % FPR) are the model's; `bootstrap` is
    the AUC with a 95 % bootstrap interval, which assumes less. `difference` is the AUC
    minus the reference's, `original` and `control` the same of these models. The
    attacks that a verdict is based on also have `tpr_1_difference` and so on.
    """
    signals = {
        name: attack_signals(predictions)
        for name, predictions in inputs._asdict().items()
        if predictions is not None
    }

    def attack(view: str, name: str) -> dict[str, Any]:
        own = signals["model"][view][name]
        result: dict[str, Any] = {
            "auc": auc_interval(own, CONFIDENCE),
            "bootstrap": auc_bootstrap(own),
            **{key: tpr_at_fpr(own, fpr, CONFIDENCE) for key, fpr in _FPRS.items()},
        }
        for key, model in _DIFFERENCES.items():
            result[key] = result[f"tpr_1_{key}"] = None
            if model in signals and "reference" in signals:
                pair = signals[model][view][name], signals["reference"][view][name]
                result[key] = auc_difference(*pair, confidence=CONFIDENCE)
                if name == VERDICT_SIGNALS.get(view):
                    result[f"tpr_1_{key}"] = tpr_difference(
                        *pair, fpr=_FPRS["tpr_1"], confidence=CONFIDENCE
                    )
        return {key: to_list(interval) for key, interval in result.items()}

    return {
        view: {name: attack(view, name) for name in by_name}
        for view, by_name in signals["model"].items()
    }


def attack_signals(model: Predictions) -> dict[str, dict[str, Signals]]:
    """Returns the membership signals by view and name, of rows that have an image."""
    signals: dict[str, dict[str, Signals]] = {}
    for view in VIEWS:
        by_name = membership_signals(
            model.logits[view], model.labels, model.multi_label
        )
        signals[view] = {n: _to_signals(model, view, x) for n, x in by_name.items()}
    signals["pair"] = {"cosine": _to_signals(model, "pair", model.pair)}
    signals["white"] = {"ridge": _to_signals(model, "white", model.trunk_probe)}
    return signals


def _to_signals(model: Predictions, view: str, values: np.ndarray) -> Signals:
    rows, group = model.available(view) & model.has_image, model.group
    members, nonmembers = (rows & (model.split == s) for s in ("unlearn", "unseen"))
    groups = group[members], group[nonmembers]
    return Signals(values[members], values[nonmembers], groups)


def ranking_scores(model: Predictions) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns scores by split and view.

    `right` is the accuracy, or with several labels the F1 score averaged over rows.
    """

    def score(split: str, view: str) -> dict[str, Any]:
        rows = (model.split == split) & model.available(view)
        logits, labels = model.logits[view][rows], model.labels[rows]
        options: dict[str, Any] = {"groups": model.group[rows], "bounds": (0, 1)}
        intervals = {
            name: jackknife_interval(
                metric, logits, labels, folds=_NUM_FOLDS, **options
            )
            for name, metric in _RANKING_SCORES.items()
        }
        intervals["right"] = None
        if len(logits) and np.isfinite(logits).all():
            values = classification.row_scores(logits, labels, model.multi_label)
            intervals["right"] = mean_interval(values, **options)
        return {name: to_list(interval) for name, interval in intervals.items()}

    return {s: {v: score(s, v) for v in VIEWS} for s in ("unlearn", "unseen", "test")}


def score_difference(
    model: Predictions, reference: Predictions | None, view: str
) -> list[float] | None:
    """Returns the unlearn-set score minus the reference's, paired by row."""
    rows = (model.split == "unlearn") & model.available(view)
    if reference is None:
        return None
    difference = classification.score_difference(
        model.logits[view][rows],
        reference.logits[view][rows],
        model.labels[rows],
        model.multi_label,
        confidence=CONFIDENCE,
        groups=model.group[rows],
    )
    return to_list(difference)


def score_excess(
    model: Predictions, reference: Predictions | None, view: str
) -> list[float] | None:
    """Returns `score_difference` minus the same on unseen rows."""
    rows = np.isin(model.split, ("unlearn", "unseen")) & model.available(view)
    if reference is None:
        return None
    excess = classification.score_excess(
        model.logits[view][rows],
        reference.logits[view][rows],
        model.labels[rows],
        model.split[rows] == "unlearn",
        model.multi_label,
        confidence=CONFIDENCE,
        groups=model.group[rows],
    )
    return to_list(excess)


def gaps(model: Predictions, reference: Predictions | None) -> dict[str, Any]:
    """Returns average gap (percentage points) and Tug-of-War of the image view.

    A gap has no sign: even that of two equal models is above zero by chance, with an
    interval that may exclude zero. Compare with the control's.
    """
    if reference is None:
        return dict.fromkeys(_GAPS)
    values = [_row_values(x) for x in (model, reference)]

    def measure(gap: Any, maximum: float) -> list[float] | None:
        def score(rows: np.ndarray) -> float | None:
            return gap(*(_split_scores(model.split, x, rows) for x in values))

        rows = np.arange(len(model.id))
        options: dict[str, Any] = {"groups": model.group, "bounds": (0, maximum)}
        return to_list(jackknife_interval(score, rows, folds=_NUM_FOLDS, **options))

    return {name: measure(*gap) for name, gap in _GAPS.items()}


def _row_values(model: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image view's score and loss signal by row; NaN without an image."""
    logits, has_image = model.logits["image"], model.available("image")
    scores = classification.row_scores(logits, model.labels, model.multi_label)
    scores = np.where(np.isfinite(logits).all(axis=1), scores, np.inf)
    signal = membership_signals(logits, model.labels, model.multi_label)["loss"]
    return np.where(has_image, scores, np.nan), np.where(has_image, signal, np.nan)


def _split_scores(
    split: np.ndarray, values: tuple[np.ndarray, np.ndarray], rows: np.ndarray
) -> dict[str, float | None]:
    """Returns the mean score of each split, and the attack's AUC, of some rows."""
    scores, signal = (x[rows] for x in values)
    split, has_image = split[rows], ~np.isnan(scores)
    result: dict[str, float | None] = {}
    for name in ("retain", "unlearn", "test"):
        own = scores[has_image & (split == name)]
        mean = float(own.mean()) if len(own) else np.inf
        result[name] = mean if np.isfinite(mean) else None
    members, nonmembers = (
        signal[has_image & (split == name)] for name in ("unlearn", "unseen")
    )
    auc = auc_interval(Signals(members, nonmembers))
    return result | {"attack": None if auc is None else auc.value}


def prediction_distances(
    model: Predictions, reference: Predictions | None
) -> dict[str, Any]:
    """Returns the distances of predictions from the reference's, by split and view."""
    if reference is None:
        return {}
    greatest = float(np.sqrt(model.labels.shape[1] if model.multi_label else 2))
    measures = {
        "js_divergence": (distances.js_divergence, 1.0),
        "agreement": (distances.agreement, 1.0),
        "activation_distance": (distances.activation_distance, greatest),
    }

    def measure(split: str, view: str) -> dict[str, Any]:
        rows = (model.split == split) & model.available(view)
        pair = model.logits[view][rows], reference.logits[view][rows]
        if not all(np.isfinite(x).all() for x in pair):
            return {}
        result = {}
        for name, (distance, maximum) in measures.items():
            values, groups = distance(*pair, model.multi_label), model.group[rows]
            result[name] = to_list(
                mean_interval(values, bounds=(0, maximum), groups=groups)
            )
        return result

    return {s: {v: measure(s, v) for v in VIEWS} for s in ("unlearn", "test")}


def epsilon_lower_bounds(model: Predictions) -> dict[str, float | None]:
    """Returns lower bounds of epsilon by view, which hold together with 95 %.

    Each is from the best threshold on the view's signal.
    """
    signals, confidence = attack_signals(model), 1 - 0.05 / len(VERDICT_SIGNALS)
    return {
        view: threshold_epsilon(signals[view][name], confidence)
        for view, name in VERDICT_SIGNALS.items()
    }
