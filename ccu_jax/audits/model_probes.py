"""Audits that need the model itself: extra passes over rows, and training it again."""

from typing import Any

import numpy as np

from ccu_jax.audits import relearning
from ccu_jax.audits.offline import CONFIDENCE
from ccu_jax.methods import Problem
from ccu_jax.metrics import distances
from ccu_jax.metrics import membership as attacks
from ccu_jax.metrics import roc as auc
from ccu_jax.metrics.intervals import jackknife_interval, to_list
from ccu_jax.runs.context import RunContext

_ROWS = 1000  # of the retain set, at most, whose embeddings are compared
_EMBEDDINGS = {"image": "h_image", "text": "h_text", "fused": "h_fused"}


def look(problem: Problem, params, group) -> dict[str, np.ndarray]:
    """What a model makes of some rows of the retain set, and of pictures alone.

    Args:
        problem: with sets and table.
        params: all parts of the model, on the devices.
        group: of all rows, which go together.

    Returns:
        `image`, `text`, `fused`: embeddings `[N, W]`, none where no row has both;
        `labels` `[N, K]`; `unlearn` and `unseen`: `loss` signals `[M]` of the fused
        view whose text is hidden; `groups` of these, by name, and of `retain`.
    """
    table, sets = problem.table, problem.sets
    has = {n: np.asarray(table[f"has_{n}"]) for n in ("image", "text")}
    whole = sets.retain[has["image"][sets.retain] & has["text"][sets.retain]]
    rng = np.random.default_rng([problem.seed, 0xCA])
    some = np.sort(rng.choice(whole, min(_ROWS, len(whole)), replace=False))
    labels = np.asarray(table["labels"])
    found: dict[str, Any] = {"labels": labels[some], "groups": {"retain": group[some]}}
    if len(some):
        said = problem.forward.outputs(params, table, some)
        found |= {view: said[name] for view, name in _EMBEDDINGS.items()}
    # Its text hidden, a row has nothing but its picture to be known by.
    silent = problem.executor.replicate(np.zeros_like(has["text"]))
    for name in ("unlearn", "unseen"):
        rows = getattr(sets, name)
        rows = rows[has["image"][rows]]
        hidden = {**table, "has_text": silent}
        logits = problem.forward.outputs(params, hidden, rows)["fused"]
        told = attacks.membership_signals(logits, labels[rows], problem.multi_label)
        found[name] = told["loss"]
        found["groups"][name] = group[rows]
    return found


def compare(
    mine: dict, original: dict, reference: dict | None, control: dict | None
) -> dict[str, Any]:
    """What a model has made of the retain set, and what it says of pictures alone.

    Args:
        mine: of `look`.
        original: likewise; similarity to it is what was kept.
        reference: likewise, to compare the attack with.
        control: likewise, a second reference.

    Returns:
        Plain JSON: `cka` by view to the original and the reference, `within_class` the
        similarity within classes, `scatter` of the image embeddings, `neutral` the
        attack on the fused view without text, and its AUC less the reference's, of the
        model, of the original and of the control.
    """
    others = {"original": original, "reference": reference}
    there = {
        name: other
        for name, other in others.items()
        if other is not None and "image" in mine
    }
    groups = mine["groups"]["retain"]

    def alike(other, view):
        return to_list(distances.cka_interval(mine[view], other[view], groups=groups))

    def within(other):
        places = mine["image"], other["image"], mine["labels"]
        return to_list(distances.intra_class_similarity(*places))

    scatter = None
    if "image" in mine:
        places = mine["image"], mine["labels"]
        how = {"groups": groups, "bounds": (0, np.inf)}
        scatter = to_list(jackknife_interval(distances.scatter_ratio, *places, **how))
    return {
        "cka": {n: {v: alike(x, v) for v in _EMBEDDINGS} for n, x in there.items()},
        "within_class": {name: within(other) for name, other in there.items()},
        "scatter": scatter,
        "neutral": _neutral(mine, others | {"control": control}),
    }


def _neutral(mine, others):
    """The attack without text, and how far from the reference's AUC whose is."""
    groups = mine["groups"]["unlearn"], mine["groups"]["unseen"]

    def sides(model):
        return model["unlearn"], model["unseen"]

    found = {"auc": auc.auc_interval(*sides(mine), groups=groups)}
    compared = {
        "difference": mine,
        "original": others["original"],
        "control": others["control"],
    }
    for name, model in compared.items():
        found[name] = None
        if model is not None and others["reference"] is not None:
            pair = *sides(model), *sides(others["reference"])
            found[name] = auc.auc_difference(
                *pair, confidence=CONFIDENCE, groups=groups
            )
    return {name: to_list(value) for name, value in found.items()}


def relearned(ctx: RunContext, problem: Problem, method: str, params) -> dict[str, Any]:
    """Steps until a model is taught again what it was to forget."""
    folder = ctx.workdir / "audits" / f"{method}-{problem.seed}-steps"
    return relearning.relearn(ctx, problem, params, folder)._asdict()
