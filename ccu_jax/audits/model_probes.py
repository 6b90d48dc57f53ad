"""Measurements that need a model's parameters: embeddings, and text-masked outputs."""

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
    """Embeddings of N retain rows, and signals of unlearn and unseen rows.

    Attributes:
        views: the embeddings by view, `[N, W]`; empty if no row has both modalities.
        labels: `[N, K]`.
        groups: `[N]`.
        signals: `loss` signals of the fused view with the text masked.
    """

    views: dict[str, np.ndarray]
    labels: np.ndarray
    groups: np.ndarray
    signals: Signals


def embed(problem: Problem, params: Params, group: np.ndarray) -> Embeddings:
    """Runs a model on some retain rows, and on the attacked rows with the text masked.

    `group` holds the groups of all rows of the data set.
    """
    table, sets = problem.table, problem.sets
    has_image, has_text = (np.asarray(table[f"has_{n}"]) for n in ("image", "text"))
    labels = np.asarray(table["labels"])
    complete = sets.retain[has_image[sets.retain] & has_text[sets.retain]]
    rng = np.random.default_rng([problem.seed, 0xCA])
    num_rows = min(_MAX_ROWS, len(complete))
    rows = np.sort(rng.choice(complete, num_rows, replace=False))
    views = {}
    if len(rows):
        outputs = problem.forward.outputs(params, table, rows)
        views = {view: outputs[name] for view, name in _OUTPUTS.items()}
    no_text = problem.executor.replicate(np.zeros_like(has_text))
    masked = {**table, "has_text": no_text}

    def signal(rows: np.ndarray) -> np.ndarray:
        logits = problem.forward.outputs(params, masked, rows)["fused"]
        return membership_signals(logits, labels[rows], problem.multi_label)["loss"]

    members, nonmembers = (x[has_image[x]] for x in (sets.unlearn, sets.unseen))
    return Embeddings(
        views=views,
        labels=labels[rows],
        groups=group[rows],
        signals=Signals(
            signal(members), signal(nonmembers), (group[members], group[nonmembers])
        ),
    )


def compare_embeddings(
    model: Embeddings,
    original: Embeddings,
    reference: Embeddings,
    control: Embeddings,
) -> dict[str, Any]:
    """Compares a model's embeddings with the original's and the reference's.

    Returns:
        Plain JSON: `cka` by model and view, `within_class` (intra-class similarity) by
        model, `scatter` of the image embeddings, and `neutral`, the text-masked attack.
    """
    others = {"original": original, "reference": reference} if model.views else {}
    scatter = None
    if model.views:
        scatter = jackknife_interval(
            distances.scatter_ratio,
            model.views["image"],
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
                    model.views["image"], other.views["image"], model.labels
                )
            )
            for name, other in others.items()
        },
        "scatter": to_list(scatter),
        "neutral": text_masked_attack(model, original, reference, control),
    }


def _cka(model: Embeddings, other: Embeddings, view: str) -> list[float] | None:
    pair = model.views[view], other.views[view]
    return to_list(distances.cka_interval(*pair, groups=model.groups))


def text_masked_attack(
    model: Embeddings,
    original: Embeddings,
    reference: Embeddings,
    control: Embeddings,
) -> dict[str, list[float] | None]:
    """Attacks the fused view with the text masked, which leaves only the image.

    Returns:
        `auc` of the model, and `difference`, `original` and `control`: the AUC of the
        model, of the original and of a second reference minus the reference's.
    """
    result = {"auc": to_list(auc_interval(model.signals))}
    compared = {"difference": model, "original": original, "control": control}
    for name, other in compared.items():
        difference = auc_difference(other.signals, reference.signals, CONFIDENCE)
        result[name] = to_list(difference)
    return result
