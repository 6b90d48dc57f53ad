"""Audit measurements that need a model's parameters.

These are the similarity of embeddings, an attack on the fused view with the text
masked, and the relearning time: the training steps that restore unlearned images.
"""

import dataclasses
import pathlib
import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ccu_jax.audits.offline import CONFIDENCE
from ccu_jax.audits.records import COMPARISON_MODELS
from ccu_jax.methods import Problem, stopping
from ccu_jax.methods.reference import make_training_program
from ccu_jax.metrics import distances
from ccu_jax.metrics.intervals import jackknife_interval, to_list
from ccu_jax.metrics.membership import membership_signals
from ccu_jax.metrics.roc import Signals, auc_difference, auc_interval
from ccu_jax.models import Params
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import NullStage
from ccu_jax.runs.stages import load_params
from ccu_jax.train import checkpoint
from ccu_jax.train.program import Program

_MAX_ROWS = 1000  # of the retain set to compare embeddings on
_OUTPUTS = {"image": "h_image", "text": "h_text", "fused": "h_fused"}
MAX_RELEARNING_STEPS = 100
_RELEARN = "relearn"  # also selects the random stream
_NUM_TRAININGS = 3
_SPLIT = stopping.MONITORED_SPLITS[0]


class Embeddings(NamedTuple):
    """Embeddings of N retain rows and attack signals of unlearn and unseen rows."""

    views: dict[str, np.ndarray]  # `[N, W]` each; empty if no row has both modalities
    labels: np.ndarray  # `[N, K]`
    groups: np.ndarray  # `[N]`
    signals: Signals  # loss of the fused view with the text masked


class ModelProbes:
    """Measures the models of one seed and caches their embeddings."""

    def __init__(self, ctx: RunContext, problem: Problem):
        """Initializes with a problem that has the parameters of the original."""
        self._ctx, self._problem = ctx, problem
        self._embeddings: dict[str, Embeddings] = {}

    def measure(self, method: str) -> dict[str, Any]:
        """Returns all measurements of the model of a method as plain JSON."""
        start_s = time.perf_counter()
        ctx, problem = self._ctx, self._problem
        names = (method, *COMPARISON_MODELS)
        for name in names:
            if name not in self._embeddings:
                params = load_params(ctx, problem.seed, name)
                self._embeddings[name] = embed(problem, params, ctx.data.group)
        result = compare_embeddings(*(self._embeddings[name] for name in names))
        params = load_params(ctx, problem.seed, method)
        probed_s = time.perf_counter()
        folder = ctx.workdir / "audits" / f"{method}-{problem.seed}-steps"
        result["relearning"] = relearn(ctx, problem, params, folder)
        relearning_s = time.perf_counter() - probed_s
        costs = {"model probes": probed_s - start_s, "relearning": relearning_s}
        return result | {"costs_s": costs}


def embed(problem: Problem, params: Params, group: np.ndarray) -> Embeddings:
    """Embeds sampled retain rows and attacks the fused view with the text masked.

    `group` has the group of every row of the data set.
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
        outputs = problem.forward.compute_outputs(params, table, rows)
        views = {view: outputs[name] for view, name in _OUTPUTS.items()}
    no_text = problem.executor.replicate(np.zeros_like(has_text))
    masked = {**table, "has_text": no_text}

    def compute_signal(rows: np.ndarray) -> np.ndarray:
        logits = problem.forward.compute_outputs(params, masked, rows)["fused"]
        return membership_signals(logits, labels[rows], problem.multi_label)["loss"]

    members, nonmembers = (x[has_image[x]] for x in (sets.unlearn, sets.unseen))
    groups = group[members], group[nonmembers]
    signals = Signals(compute_signal(members), compute_signal(nonmembers), groups)
    return Embeddings(views, labels[rows], group[rows], signals)


def compare_embeddings(
    model: Embeddings, original: Embeddings, reference: Embeddings, control: Embeddings
) -> dict[str, Any]:
    """Compares the embeddings of a model with those of the original and reference.

    Returns:
        Plain JSON: `cka` by model and view, `within_class` (intra-class similarity) by
        model, `scatter` of the image embeddings, and `neutral`, the attack on the fused
        view with the text masked, which leaves only the image. That has the `auc` of
        the model, and as `difference`, `original` and `control` the AUC of the model,
        of the original and of a second reference minus the reference's.
    """
    result: dict[str, Any] = {"cka": {}, "within_class": {}, "scatter": None}
    labels, groups = model.labels, model.groups
    if model.views:
        for name, other in {"original": original, "reference": reference}.items():
            pairs = {view: (x, other.views[view]) for view, x in model.views.items()}
            result["cka"][name] = {
                view: to_list(distances.cka_interval(*pair, groups=groups))
                for view, pair in pairs.items()
            }
            similarity = distances.intra_class_similarity(*pairs["image"], labels)
            result["within_class"][name] = to_list(similarity)
        image, bounds = model.views["image"], (0, np.inf)
        scatter = jackknife_interval(
            distances.scatter_ratio, image, labels, groups=groups, bounds=bounds
        )
        result["scatter"] = to_list(scatter)
    attack = {"auc": auc_interval(model.signals)}
    attacked = {"difference": model, "original": original, "control": control}
    for name, other in attacked.items():
        attack[name] = auc_difference(other.signals, reference.signals, CONFIDENCE)
    result["neutral"] = {name: to_list(interval) for name, interval in attack.items()}
    return result


def relearn(
    ctx: RunContext,
    problem: Problem,
    params: Params,
    folder: pathlib.Path,
    tolerance: float = 0.01,
) -> dict[str, Any]:
    """Trains a model on the unlearn set until it regains the original's image score.

    A model that still has information about the images relearns them faster than one
    that never saw them (Tarun et al. 2023): compare with the steps of the reference.

    `folder` is a temporary checkpoint folder; `tolerance` is the relative shortfall
    from the original's score that counts as restored.

    Returns:
        Plain JSON: the median of the `steps` of several trainings and their range,
        `min_steps` to `max_steps`, each None if the score was not restored within
        `limit` steps; the total `seconds`; and as `diverged` the reason, or None.
    """
    steps, seconds, diverged = [], 0.0, None
    for index in range(_NUM_TRAININGS):
        # Each training shuffles the rows differently.
        seeded = problem._replace(method=_RELEARN, seed=problem.seed + (index << 32))
        target = np.float32((1 - tolerance) * _score_original(seeded))

        def method(problem: Problem, target: np.float32 = target) -> Program:
            return _make_program(problem._replace(params=params), target)

        steps_folder = folder / str(index)
        outcome = ctx.loop.run(_RELEARN, method, seeded, steps_folder, NullStage())
        is_restored = outcome.steps < MAX_RELEARNING_STEPS and not outcome.diverged
        steps.append(outcome.steps if is_restored else MAX_RELEARNING_STEPS)
        seconds += outcome.seconds["steps"]
        diverged = diverged or outcome.diverged
        checkpoint.remove(steps_folder)
    checkpoint.remove(folder)
    low, median, high = (x if x < MAX_RELEARNING_STEPS else None for x in sorted(steps))
    return {
        "steps": median,
        "min_steps": low,
        "max_steps": high,
        "limit": MAX_RELEARNING_STEPS,
        "seconds": seconds,
        "diverged": diverged,
    }


def _score_original(problem: Problem) -> float:
    """Returns the original's image score on the monitored rows of the unlearn set."""
    rows = stopping.subsample(problem, problem.sets.unlearn, _SPLIT)
    outputs = problem.forward.compute_outputs(problem.original, problem.table, rows)
    logits = outputs["image"]
    if not np.isfinite(logits).all():
        return np.inf
    labels = np.asarray(problem.table["labels"])[rows]
    weights = np.ones(len(rows), np.float32)
    return float(stopping.compute_score(logits, labels, weights, problem.multi_label))


def _make_program(problem: Problem, target: np.float32) -> Program:
    """Returns a training program that stops once the score reaches `target`."""
    unlearn, config = problem.sets.unlearn, problem.config.finetune
    epochs = MAX_RELEARNING_STEPS * config.batch / len(unlearn)
    config = dataclasses.replace(config, epochs=epochs)
    program = make_training_program(problem, problem.original, config, unlearn)
    score = stopping.make_score_fn(problem, (_SPLIT, _SPLIT))

    def check(params, frozen, aux, tables):
        return aux | {"is_restored": score(params, tables)[0] >= aux["target"]}

    return program._replace(
        sharded_tables={_SPLIT: stopping.make_monitored_tables(problem)[_SPLIT]},
        aux={"target": jnp.asarray(target), "is_restored": jnp.zeros((), bool)},
        refresh=check,
        refresh_every=1,
        stop=lambda aux: aux["is_restored"],
    )
