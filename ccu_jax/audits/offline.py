"""All audits that need nothing but the stored outputs of a model and its references."""

import hashlib
import time
from typing import Any, NamedTuple

import numpy as np

from ccu_jax.evaluate.predictions import Predictions
from ccu_jax.metrics import distances
from ccu_jax.metrics import membership as attacks
from ccu_jax.metrics import privacy as epsilon
from ccu_jax.metrics import ranking as scores
from ccu_jax.metrics import roc as auc
from ccu_jax.metrics.intervals import jackknife_interval, mean_interval, to_list
from ccu_jax.models import VIEWS

# The views by which a model is judged; the others are told of. A model that remembers
# few rows, but these well, is seen by how many are found at few false alarms, and one
# that has fallen apart by its score in two views. Six questions are asked at once, so
# each interval that a verdict hangs on is of a confidence of 1 - .05 / 6.
VERDICT_SIGNALS = {"image": "loss", "fused": "loss", "pair": "cosine"}
CONFIDENCE = 1 - 0.05 / 6
RATES = {"tpr_1": 0.01, "tpr_01": 0.001}
_COMPARED = ("retain", "unlearn", "test")
_RANKED = {
    "mean_average_precision": scores.mean_average_precision,
    "macro_auroc": scores.macro_auroc,
}
_PARTS = 10  # of the rows, that are left out in turn for an interval
# With what they are at most.
_GAPS = {
    "average_gap": (scores.average_gap, 100),
    "tug_of_war": (scores.tug_of_war, 1),
    "tug_of_war_attack": (lambda *x: scores.tug_of_war(*x, scores.TOW_ATTACK), 1),
}
# What is less the reference's, and of whose outputs.
_AGAINST = {"difference": "model", "original": "original", "control": "control"}


class Given(NamedTuple):
    """Outputs on the same rows: the model, and what it is compared with.

    `control`: of a second reference. None: there is none.
    """

    model: Predictions
    original: Predictions | None
    reference: Predictions | None
    control: Predictions | None


def audit(given: Given) -> dict[str, Any]:
    """Everything that outputs tell, as plain JSON; intervals are `[value, low, high]`.

    `costs_s`: what each of it took; `compared`: whether there was a reference.

    Raises:
        ValueError: the outputs are not of the same rows.
    """
    for other in (given.original, given.reference, given.control):
        if other is not None and (other.id != given.model.id).any():
            raise ValueError("outputs of other rows cannot be compared")
    members = "\n".join(sorted(given.model.id[given.model.split == "unlearn"].tolist()))
    found: dict[str, Any] = {
        "members": hashlib.sha256(members.encode()).hexdigest()[:16],
        "compared": given.reference is not None,
        "costs_s": {},
    }
    audits = {
        "attacks": lambda: attacked(given),
        "scores": lambda: ranked(given.model),
        "score_difference": lambda: {view: _score(given, view) for view in VIEWS},
        "score_excess": lambda: {view: _excess(given, view) for view in VIEWS},
        "gaps": lambda: gaps(given.model, given.reference),
        "distances": lambda: apart(given.model, given.reference),
        "epsilon": lambda: least_epsilon(given.model),
    }
    for name, measure in audits.items():
        began = time.perf_counter()
        found[name] = measure()
        found["costs_s"][name] = time.perf_counter() - began
    return found


def attacked(given: Given) -> dict[str, dict[str, dict[str, Any]]]:
    """By view and signal: the attack's AUC and rates, and the AUC less the reference's.

    `{view: {signal: {"auc", "bootstrap", "difference", "original", "control", "tpr_1",
    "tpr_01"}}}`; `bootstrap` is the AUC with an interval that assumes less, of 95 %;
    "original" and "control" are those models' differences from the reference, and
    `tpr_1_difference` and so on, of judged signals, the same of the rate at 1 % false
    alarms.
    """
    own = signals_of(given.model)
    of_groups = groups_of(given.model)
    others = {
        name: None if model is None else signals_of(model)
        for name, model in given._asdict().items()
    }

    def one(view, name):
        mine = own[view][name]
        how = {"confidence": CONFIDENCE, "groups": of_groups[view]}
        told = {"auc": auc.auc_interval(*mine, **how)}
        told["bootstrap"] = auc.auc_bootstrap(*mine, groups=of_groups[view])
        judged = name == VERDICT_SIGNALS.get(view)
        for key, rate in RATES.items():
            told[key] = attacks.tpr_at_fpr(*mine, rate, **how)
        for key, whose in _AGAINST.items():
            models = others[whose], others["reference"]
            told[key] = told[f"tpr_1_{key}"] = None
            if None not in models:
                sides = [side for model in models for side in model[view][name]]
                told[key] = auc.auc_difference(*sides, **how)
                if judged:
                    told[f"tpr_1_{key}"] = attacks.tpr_difference(
                        *sides, RATES["tpr_1"], **how
                    )
        return {key: to_list(value) for key, value in told.items()}

    return {view: {name: one(view, name) for name in own[view]} for view in own}


def signals_of(model: Predictions) -> dict[str, dict[str, tuple]]:
    """`{view: {signal: (of members, of others)}}`, of rows that have a picture."""
    found: dict[str, dict[str, tuple]] = {}

    def split(view, values):
        return _sides(model, view, values)

    for view in VIEWS:
        signals = attacks.membership_signals(
            model.logits[view], model.labels, model.multi_label
        )
        found[view] = {name: split(view, values) for name, values in signals.items()}
    found["pair"] = {"cosine": split("pair", model.pair)}
    found["white"] = {"ridge": split("white", model.trunk_probe)}
    return found


def groups_of(model: Predictions) -> dict[str, tuple]:
    """The groups of the rows of `signals_of`, by view."""
    return {v: _sides(model, v, model.group) for v in (*VIEWS, "pair", "white")}


def _sides(model, view, values):
    shown = model.available(view) & model.has_image
    return tuple(values[shown & (model.split == of)] for of in ("unlearn", "unseen"))


def ranked(model: Predictions) -> dict[str, dict[str, dict[str, Any]]]:
    """By set and view: mean average precision, macro AUROC, and how right rows are.

    `right` is the accuracy, with several labels the F1 score of a row's labels.
    """

    def one(of, view):
        rows = (model.split == of) & model.available(view)
        logits, labels = model.logits[view][rows], model.labels[rows]
        right, groups = None, model.group[rows]
        if len(logits) and np.isfinite(logits).all():
            each = scores.row_scores(logits, labels, model.multi_label)
            right = mean_interval(each, bounds=(0, 1), groups=groups)
        how = {"parts": _PARTS, "groups": groups, "bounds": (0, 1)}
        found = {
            name: jackknife_interval(score, logits, labels, **how)
            for name, score in _RANKED.items()
        }
        return {name: to_list(x) for name, x in (found | {"right": right}).items()}

    return {of: {v: one(of, v) for v in VIEWS} for of in ("unlearn", "unseen", "test")}


def _score(given, view):
    """The score of the unlearn set less the reference's, row by row."""
    if given.reference is None:
        return None
    rows = (given.model.split == "unlearn") & given.model.available(view)
    logits = (x.logits[view][rows] for x in (given.model, given.reference))
    return to_list(
        scores.score_difference(
            *logits,
            given.model.labels[rows],
            given.model.multi_label,
            confidence=CONFIDENCE,
            groups=given.model.group[rows],
        )
    )


def _excess(given, view):
    """The same, less that of the unseen rows."""
    if given.reference is None:
        return None
    model, reference = given.model, given.reference
    rows = np.isin(model.split, ("unlearn", "unseen")) & model.available(view)
    return to_list(
        scores.score_excess(
            model.logits[view][rows],
            reference.logits[view][rows],
            model.labels[rows],
            model.split[rows] == "unlearn",
            model.multi_label,
            confidence=CONFIDENCE,
            groups=model.group[rows],
        )
    )


def gaps(model: Predictions, reference: Predictions | None) -> dict[str, Any]:
    """Average gap (points) and Tug-of-War, both forms, of the image view.

    A gap has no sign, so that of two models that are the same it is above zero by
    chance, and an interval may be wholly there: compare with the control's.
    """
    if reference is None:
        return dict.fromkeys(_GAPS)
    mine, theirs = (_by_row(x) for x in (model, reference))
    rows = np.arange(len(model.id))

    def one(gap, most):
        def score(rows):
            return gap(*(_shares(model.split, x, rows) for x in (mine, theirs)))

        parts, groups = _PARTS, model.group
        how = {"parts": parts, "groups": groups, "bounds": (0, most)}
        return to_list(jackknife_interval(score, rows, **how))

    return {name: one(*gap) for name, gap in _GAPS.items()}


def _by_row(model):
    """How right each row is, and its signal; NaN of rows without a picture."""
    logits, shown = model.logits["image"], model.available("image")
    right = scores.row_scores(logits, model.labels, model.multi_label)
    right = np.where(np.isfinite(logits).all(axis=1), right, np.inf)
    signal = attacks.membership_signals(logits, model.labels, model.multi_label)["loss"]
    return [np.where(shown, values, np.nan) for values in (right, signal)]


def _shares(of, values, rows):
    """The mean score of each set, and the attack's AUC, of some rows."""
    right, signal = (x[rows] for x in values)
    of, shown = of[rows], ~np.isnan(right)
    found: dict[str, float | None] = {}
    for name in _COMPARED:
        mean = right[shown & (of == name)]
        mean = mean.mean() if len(mean) else np.inf
        found[name] = float(mean) if np.isfinite(mean) else None
    sides = (signal[shown & (of == name)] for name in ("unlearn", "unseen"))
    told = auc.auc_interval(*sides)
    return found | {"attack": None if told is None else told.value}


def apart(model: Predictions, reference: Predictions | None) -> dict[str, Any]:
    """How far predictions are from the reference's, by set and view."""
    if reference is None:
        return {}

    def one(of, view):
        rows = (model.split == of) & model.available(view)
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
        groups = model.group[rows]
        return {
            name: to_list(
                mean_interval(
                    measure(*pair, multi_label), bounds=(0, top), groups=groups
                )
            )
            for name, (measure, top) in measures.items()
        }

    return {of: {v: one(of, v) for v in VIEWS} for of in ("unlearn", "test")}


def least_epsilon(model: Predictions) -> dict[str, float | None]:
    """Epsilon at least, by the best threshold on each view; all at once with 95 %."""
    found, of_groups = signals_of(model), groups_of(model)
    return {
        view: epsilon.threshold_epsilon(
            *found[view][VERDICT_SIGNALS[view]],
            confidence=1 - 0.05 / len(VERDICT_SIGNALS),
            groups=of_groups[view],
        )
        for view in VERDICT_SIGNALS
    }
