"""Audits that need the model itself: extra passes over rows, and training it again."""

from typing import Any

import numpy as np

from ccu_jax import evaluate, relearning
from ccu_jax.audits import attacks, auc, distances
from ccu_jax.audits.intervals import plain
from ccu_jax.audits.outputs import LEVEL
from ccu_jax.methods import Problem

_ROWS = 1000  # of the retain set, at most, whose embeddings are compared
_EMBEDDINGS = {"image": "h_image", "text": "h_text", "fused": "h_fused"}


def look(problem: Problem, params) -> dict[str, np.ndarray]:
    """What a model makes of some rows of the retain set, and of pictures alone.

    Args:
        problem: with sets and table.
        params: all parts of the model, on the devices.

    Returns:
        `image`, `text`, `fused`: embeddings `[N, W]`; `labels` `[N, K]`; `unlearn` and
        `unseen`: `loss` signals `[M]` of the fused view whose text is hidden.
    """
    table, sets = problem.table, problem.sets
    has = {n: np.asarray(table[f"has_{n}"]) for n in ("image", "text")}
    whole = sets.retain[has["image"][sets.retain] & has["text"][sets.retain]]
    rng = np.random.default_rng([problem.seed, 0xCA])
    some = np.sort(rng.choice(whole, min(_ROWS, len(whole)), replace=False))
    labels = np.asarray(table["labels"])
    said = problem.forward.outputs(params, table, some)
    found = {view: said[name] for view, name in _EMBEDDINGS.items()}
    found["labels"] = labels[some]
    # Its text hidden, a row has nothing but its picture to be known by.
    silent = problem.executor.place(np.zeros_like(has["text"]))
    for name in ("unlearn", "unseen"):
        rows = getattr(sets, name)
        rows = rows[has["image"][rows]]
        hidden = {**table, "has_text": silent}
        logits = problem.forward.outputs(params, hidden, rows)["fused"]
        told = attacks.signals(logits, labels[rows], problem.multi_label)
        found[name] = told["loss"]
    return found


def compare(mine: dict, original: dict, reference: dict | None) -> dict[str, Any]:
    """What a model has made of the retain set, and what it says of pictures alone.

    Args:
        mine: of `look`.
        original: likewise; similarity to it is what was kept.
        reference: likewise, to compare the attack with.

    Returns:
        Plain JSON: `cka` by view to the original and the reference, `within_class` the
        similarity within classes, `scatter` of the image embeddings, `neutral` the
        attack on the fused view without text.
    """

    def alike(other, view):
        return distances.cka_interval(mine[view], other[view])

    others = {"original": original, "reference": reference}
    others = {name: other for name, other in others.items() if other is not None}
    sides = mine["unlearn"], mine["unseen"]
    neutral = {"auc": auc.auc_interval(*sides), "difference": None}
    if reference is not None:
        theirs = reference["unlearn"], reference["unseen"]
        neutral["difference"] = auc.auc_difference(*sides, *theirs, confidence=LEVEL)
    return {
        "cka": {
            name: {view: plain(alike(other, view)) for view in _EMBEDDINGS}
            for name, other in others.items()
        },
        "within_class": {
            name: plain(
                distances.within_class_similarity(
                    mine["image"], other["image"], mine["labels"]
                )
            )
            for name, other in others.items()
        },
        "scatter": distances.scatter_ratio(mine["image"], mine["labels"]),
        "neutral": {name: plain(value) for name, value in neutral.items()},
    }


def relearned(bench, problem: Problem, method: str, params) -> dict[str, Any]:
    """Steps until a model is taught again what it was to forget."""
    path = bench.workdir / "outputs" / f"original-{problem.seed}.npz"
    score = evaluate.scores(evaluate.load(path))["unlearn"]["image"]
    name = "micro_f1" if problem.multi_label else "accuracy"  # as `stopping.score`
    aim = relearning.target_of(score.get(name, np.nan))
    folder = bench.workdir / "audits" / f"{method}-{problem.seed}-steps"
    return relearning.relearn(bench, problem, params, aim, folder)._asdict()
