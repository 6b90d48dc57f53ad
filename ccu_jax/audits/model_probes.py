"""Measurements that need a model's parameters: embeddings, and text-masked outputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ccu_jax.audits.offline import CONFIDENCE
from ccu_jax.methods import Problem
from ccu_jax.metrics import distances
from ccu_jax.metrics.intervals import jackknife_interval, to_list
from ccu_jax.metrics.membership import membership_signals
from ccu_jax.metrics.roc import Signals, auc_difference, auc_interval
from ccu_jax.models import Params

_MAX_ROWS = 1000  # of the retain set, whose embeddings are compared
_OUTPUTS = {"image": "h_image", "text": "h_text", "fused": "h_fused"}


class Embeddings(NamedTuple):
    """A model's embeddings of N retain rows, and its signals on M unlearn and unseen.

    Attributes:
        embeddings: of each view, `[N, W]`; empty if no retain row has both modalities.
        labels: `[N, K]`.
        groups: `[N]`.
        signals: `loss` signals of the fused view with the text masked.
    """

    embeddings: dict[str, np.ndarray]
    labels: np.ndarray
    groups: np.ndarray
    signals: Signals


def embed(problem: Problem, params: Params, group: np.ndarray) -> Embeddings:
    """Runs a model on some retain rows, and on unlearn and unseen rows without text.

    Args:
        problem: with sets and table.
        params: all modules of the model, on the devices.
        group: of all rows of the data set; rows of a group are not independent.
    """
    table, sets = problem.table, problem.sets
    has_image, has_text = (np.asarray(table[f"has_{n}"]) for n in ("image", "text"))
    complete = sets.retain[has_image[sets.retain] & has_text[sets.retain]]
    rng = np.random.default_rng([problem.seed, 0xCA])
    num_rows = min(_MAX_ROWS, len(complete))
    rows = np.sort(rng.choice(complete, num_rows, replace=False))
    labels = np.asarray(table["labels"])
    embeddings = {}
    if len(rows):
        outputs = problem.forward.outputs(params, table, rows)
        embeddings = {view: outputs[name] for view, name in _OUTPUTS.items()}
    has_no_text = problem.executor.replicate(np.zeros_like(has_text))
    masked = {**table, "has_text": has_no_text}

    def attacked_rows(rows: np.ndarray) -> np.ndarray:
        return rows[has_image[rows]]

    def signal(rows: np.ndarray) -> np.ndarray:
        logits = problem.forward.outputs(params, masked, rows)["fused"]
        return membership_signals(logits, labels[rows], problem.multi_label)["loss"]

    members, nonmembers = attacked_rows(sets.unlearn), attacked_rows(sets.unseen)
    return Embeddings(
        embeddings=embeddings,
        labels=labels[rows],
        groups=group[rows],
        signals=Signals(
            signal(members), signal(nonmembers), (group[members], group[nonmembers])
        ),
    )


def compare_embeddings(
    model: Embeddings,
    original: Embeddings,
    reference: Embeddings | None,
    control: Embeddings | None,
) -> dict[str, Any]:
    """Compares a model's embeddings with the original's and the reference's.

    Args:
        model: of `embed`.
        original: the same of the original model.
        reference: the same of the reference.
        control: the same of a second reference.

    Returns:
        Plain JSON: `cka` by view, `within_class` (intra-class similarity), `scatter` of
        the image embeddings, and `neutral`, the `text_masked_attack`.
    """
    others = {"original": original, "reference": reference}
    others = {n: x for n, x in others.items() if x is not None and model.embeddings}
    scatter = None
    if model.embeddings:
        scatter = jackknife_interval(
            distances.scatter_ratio,
            model.embeddings["image"],
            model.labels,
            groups=model.groups,
            bounds=(0, np.inf),
        )
    return {
        "cka": {
            name: {view: _cka(model, other, view) for view in _OUTPUTS}
            for name, other in others.items()
        },
        "within_class": {
            name: to_list(
                distances.intra_class_similarity(
                    model.embeddings["image"], other.embeddings["image"], model.labels
                )
            )
            for name, other in others.items()
        },
        "scatter": to_list(scatter),
        "neutral": text_masked_attack(
            model,
            {"difference": model, "original": original, "control": control},
            reference,
        ),
    }


def _cka(model: Embeddings, other: Embeddings, view: str) -> list[float] | None:
    pair = model.embeddings[view], other.embeddings[view]
    return to_list(distances.cka_interval(*pair, groups=model.groups))


def text_masked_attack(
    model: Embeddings,
    compared: Mapping[str, Embeddings | None],
    reference: Embeddings | None,
) -> dict[str, list[float] | None]:
    """Attacks the fused view with the text masked, so that only the image is left.

    Returns:
        `auc` of the model, and of each compared model the AUC minus the reference's.
    """
    result = {"auc": to_list(auc_interval(model.signals))}
    for name, other in compared.items():
        result[name] = None
        if other is not None and reference is not None:
            difference = auc_difference(other.signals, reference.signals, CONFIDENCE)
            result[name] = to_list(difference)
    return result
