"""Audit measurements that need only the stored outputs of models."""

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ccu_jax.evaluate.predictions import SPLITS, Predictions
from ccu_jax.methods import CONTROL, REFERENCE
from ccu_jax.metrics import classification, distances, roc
from ccu_jax.metrics.intervals import (
    Interval,
    difference_interval,
    jackknife_interval,
    mean_interval,
    to_list,
)
from ccu_jax.metrics.membership import membership_signals
from ccu_jax.metrics.privacy import threshold_epsilon
from ccu_jax.metrics.roc import Signals
from ccu_jax.models import VIEWS

# The signal of the attack that a verdict is based on, by view.
VERDICT_SIGNALS = {"image": "loss", "fused": "loss", "pair": "cosine"}
# A verdict tests six differences: three AUCs, two scores and the TPR at 1 % FPR.
CONFIDENCE = 1 - 0.05 / 6
_FPRS = {"tpr_1": 0.01, "tpr_01": 0.001}
_NUM_FOLDS = 10  # of the delete-a-group jackknife
_RANKING_SCORES = {
    "mean_average_precision": classification.mean_average_precision,
    "macro_auroc": classification.macro_auroc,
}
_tug_of_war_attack = partial(classification.tug_of_war, names=classification.TOW_ATTACK)
# Functions and their largest possible values.
_GAPS = {
    "average_gap": (classification.average_gap, 100),
    "tug_of_war": (classification.tug_of_war, 1),
    "tug_of_war_attack": (_tug_of_war_attack, 1),
}
# Models that are compared with the reference, by the key of the difference.
DIFFERENCES = {"difference": "model", "original": "original", "control": CONTROL}

# Outputs on the same rows: those of the audited model as "model", and those of the
# comparison models by method. Without a reference, comparisons with it are None.
Outputs = Mapping[str, Predictions]


def audit_outputs(outputs: Outputs) -> dict[str, Any]:
    """Returns all measurements as plain JSON; intervals are `[value, low, high]`.

    Values that cannot be measured are None. `members` is a hash of the unlearn set,
    `compared` says whether there is a reference, and `costs_s` has the seconds of each
    measurement.

    Raises ValueError if the outputs have different rows.
    """
    model = outputs["model"]
    if any((compared.id != model.id).any() for compared in outputs.values()):
        raise ValueError(
            "outputs have different rows; predict the same rows with every model"
        )
    members = "\n".join(sorted(model.id[model.split == "unlearn"].tolist()))
    record: dict[str, Any] = {
        "members": hashlib.sha256(members.encode()).hexdigest()[:16],
        "compared": REFERENCE in outputs,
        "costs_s": {},
    }
    measurements = {
        "attacks": measure_attacks,
        "scores": measure_scores,
        "score_difference": measure_score_differences,
        "score_excess": partial(measure_score_differences, is_excess=True),
        "gaps": measure_gaps,
        "distances": measure_distances,
        "epsilon": bound_epsilon,
    }
    for name, measure in measurements.items():
        start_s = time.perf_counter()
        record[name] = measure(outputs)
        record["costs_s"][name] = time.perf_counter() - start_s
    return record


def measure_attacks(outputs: Outputs) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the results of each membership attack by view and signal.

    `auc`, `tpr_1` and `tpr_01` (at 1 % and 0.1 % FPR) are those of the model;
    `bootstrap` is the AUC with a 95 % bootstrap confidence interval. `difference`,
    `original` and `control` are the AUCs of the model, the original and the control
    minus that of the reference. The attacks in VERDICT_SIGNALS also have these
    differences of the TPR at 1 % FPR, as `tpr_1_difference` and so on.
    """
    signals = {name: compute_signals(model) for name, model in outputs.items()}

    def attack(view: str, name: str) -> dict[str, Any]:
        of_models = {model: by_view[view][name] for model, by_view in signals.items()}
        model = of_models["model"]
        auc, bootstrap = roc.auc_interval(model, CONFIDENCE), roc.auc_bootstrap(model)
        result: dict[str, Any] = {"auc": auc, "bootstrap": bootstrap}
        for key, fpr in _FPRS.items():
            result[key] = roc.tpr_at_fpr(model, fpr, CONFIDENCE)
        for key, compared in DIFFERENCES.items():
            result[key] = result[f"tpr_1_{key}"] = None
            if compared in of_models and REFERENCE in of_models:
                pair = of_models[compared], of_models[REFERENCE]
                result[key] = roc.auc_difference(*pair, CONFIDENCE)
                if name == VERDICT_SIGNALS.get(view):
                    tpr = roc.tpr_difference(*pair, _FPRS["tpr_1"], CONFIDENCE)
                    result[f"tpr_1_{key}"] = tpr
        return {key: to_list(interval) for key, interval in result.items()}

    return {
        view: {name: attack(view, name) for name in by_name}
        for view, by_name in signals["model"].items()
    }


def compute_signals(model: Predictions) -> dict[str, dict[str, Signals]]:
    """Returns the membership signals of rows with an image, by view and signal name."""

    def select(view: str, values: np.ndarray) -> Signals:
        rows = model.has_modalities(view) & model.has_image
        members, nonmembers = (rows & (model.split == s) for s in ("unlearn", "unseen"))
        groups = model.group[members], model.group[nonmembers]
        return Signals(values[members], values[nonmembers], groups)

    signals: dict[str, dict[str, Signals]] = {}
    for view in VIEWS:
        logits = model.logits[view]
        by_name = membership_signals(logits, model.labels, model.multi_label)
        signals[view] = {name: select(view, x) for name, x in by_name.items()}
    signals["pair"] = {"cosine": select("pair", model.pair)}
    signals["white"] = {"ridge": select("white", model.trunk_probe)}
    return signals


def measure_scores(outputs: Outputs) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the scores of the model by split and view.

    `right` is the accuracy, or for multi-label data the mean F1 score per row.
    """
    model = outputs["model"]

    def measure(split: str, view: str) -> dict[str, Any]:
        rows = (model.split == split) & model.has_modalities(view)
        logits, labels = model.logits[view][rows], model.labels[rows]
        options: dict[str, Any] = {"groups": model.group[rows], "bounds": (0, 1)}
        intervals = {
            name: jackknife_interval(score, logits, labels, folds=_NUM_FOLDS, **options)
            for name, score in _RANKING_SCORES.items()
        }
        intervals["right"] = None
        if len(logits) and np.isfinite(logits).all():
            values = classification.row_scores(logits, labels, model.multi_label)
            intervals["right"] = mean_interval(values, **options)
        return {name: to_list(interval) for name, interval in intervals.items()}

    return {s: {v: measure(s, v) for v in VIEWS} for s in ("unlearn", "unseen", "test")}


def measure_score_differences(
    outputs: Outputs, is_excess: bool = False
) -> dict[str, list[float] | None]:
    """Returns, by view, the score on the unlearn set minus the reference's, paired.

    `is_excess` subtracts the same difference on unseen rows: the result is 0 for a
    model that scores higher on all images, positive if it memorizes the unlearn set.
    """
    model, reference = outputs["model"], outputs.get(REFERENCE)
    if reference is None:
        return dict.fromkeys(VIEWS)

    def difference(view: str, split: str) -> Interval | None:
        rows = (model.split == split) & model.has_modalities(view)
        return classification.score_difference(
            *(model.logits[view][rows], reference.logits[view][rows]),
            *(model.labels[rows], model.multi_label),
            confidence=CONFIDENCE,
            groups=model.group[rows],
        )

    def measure(view: str) -> list[float] | None:
        unlearn = difference(view, "unlearn")
        if not is_excess or unlearn is None:
            return to_list(unlearn)
        unseen = difference(view, "unseen")
        return None if unseen is None else to_list(difference_interval(unlearn, unseen))

    return {view: measure(view) for view in VIEWS}


def measure_gaps(outputs: Outputs) -> dict[str, Any]:
    """Returns the average gap (percentage points) and Tug-of-War of the image view.

    Gaps are absolute values: even for two equally trained models they are positive by
    chance, and the interval may exclude zero. Compare with those of the control.
    """
    model, reference = outputs["model"], outputs.get(REFERENCE)
    if reference is None:
        return dict.fromkeys(_GAPS)
    arrays = [x for model_ in (model, reference) for x in _score_rows(model_)]

    def measure(gap: Callable, maximum: float) -> list[float] | None:
        def score(split: np.ndarray, *values: np.ndarray) -> float | None:
            pairs = values[:2], values[2:]
            return gap(*(_average_splits(split, *pair) for pair in pairs))

        options: dict[str, Any] = {"groups": model.group, "bounds": (0, maximum)}
        interval = jackknife_interval(
            score, model.split, *arrays, folds=_NUM_FOLDS, **options
        )
        return to_list(interval)

    return {name: measure(*gap) for name, gap in _GAPS.items()}


def _score_rows(model: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and loss signals of the image view by row, NaN without image."""
    logits, has_image = model.logits["image"], model.has_modalities("image")
    scores = classification.row_scores(logits, model.labels, model.multi_label)
    scores = np.where(np.isfinite(logits).all(axis=1), scores, np.inf)
    signal = membership_signals(logits, model.labels, model.multi_label)["loss"]
    return np.where(has_image, scores, np.nan), np.where(has_image, signal, np.nan)


def _average_splits(
    split: np.ndarray, scores: np.ndarray, signal: np.ndarray
) -> dict[str, float | None]:
    """Returns the mean score of each split and the attack AUC."""
    rows = {name: ~np.isnan(scores) & (split == name) for name in SPLITS}
    result: dict[str, float | None] = {}
    for name in ("retain", "unlearn", "test"):
        mean = float(scores[rows[name]].mean()) if rows[name].any() else np.inf
        result[name] = mean if np.isfinite(mean) else None
    auc = roc.auc_interval(Signals(signal[rows["unlearn"]], signal[rows["unseen"]]))
    return result | {"attack": None if auc is None else auc.value}


def measure_distances(outputs: Outputs) -> dict[str, Any]:
    """Returns distances to the predictions of the reference, by split and view."""
    model, reference = outputs["model"], outputs.get(REFERENCE)
    if reference is None:
        return {}
    # Distance between different one-hot predictions, or between multi-label
    # predictions that differ in every label.
    max_distance = float(np.sqrt(model.labels.shape[1] if model.multi_label else 2))
    measures = {
        "js_divergence": (distances.js_divergence, 1.0),
        "agreement": (distances.agreement, 1.0),
        "activation_distance": (distances.activation_distance, max_distance),
    }

    def measure(split: str, view: str) -> dict[str, Any]:
        rows = (model.split == split) & model.has_modalities(view)
        pair = model.logits[view][rows], reference.logits[view][rows]
        if not all(np.isfinite(x).all() for x in pair):
            return {}
        result = {}
        for name, (distance, maximum) in measures.items():
            values, groups = distance(*pair, model.multi_label), model.group[rows]
            interval = mean_interval(values, bounds=(0, maximum), groups=groups)
            result[name] = to_list(interval)
        return result

    return {s: {v: measure(s, v) for v in VIEWS} for s in ("unlearn", "test")}


def bound_epsilon(outputs: Outputs) -> dict[str, float | None]:
    """Returns lower confidence bounds on epsilon by view, at 95 % jointly (Bonferroni).

    Each comes from the best threshold on the signal of the view.
    """
    signals = compute_signals(outputs["model"])
    confidence = 1 - 0.05 / len(VERDICT_SIGNALS)
    return {
        view: threshold_epsilon(signals[view][name], confidence)
        for view, name in VERDICT_SIGNALS.items()
    }
