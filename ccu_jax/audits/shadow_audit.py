"""Attacks with shadow models: U-LiRA, LiRA, RMIA, one-run epsilon, pool distances.

The shadow models are trained once per seed (`shadow_models.py`). Each method is run on
all of them to unlearn the images of their halves. Thus every row has models that
unlearned it and models that never saw it, to compare the audited model with.
"""

import functools
import hashlib
import time
import warnings
from typing import Any

import jax
import numpy as np

from ccu_jax.audits import shadow_models
from ccu_jax.audits.records import load_outputs
from ccu_jax.distributed.hosts import Progress, all_agree, barrier, is_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate.predictions import (
    Predictions,
    load_predictions,
    predict_all_splits,
    save_predictions,
)
from ccu_jax.methods import METHODS, REFERENCES, Problem
from ccu_jax.metrics import forgetting, lira
from ccu_jax.metrics.classification import row_scores
from ccu_jax.metrics.intervals import Interval, to_list
from ccu_jax.metrics.membership import membership_signals, true_probability
from ccu_jax.metrics.privacy import one_run_audit
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import NullStage
from ccu_jax.train import checkpoint

# The other views use texts: all shadow models are trained on texts of the unlearn set,
# but only those trained on the image of an unseen row are trained on its text.
_VIEW = "image"
MIN_SHADOWS_FOR_DISTANCES = 12  # pools are a quarter of them, with at least 3 models
_MAX_RETAIN_ROWS = 500
# Logits `[N, K]`, labels `[N, K]`, and whether the labels are multi-label.
_LabeledLogits = tuple[np.ndarray, np.ndarray, bool]


class ShadowPool:
    """The shadow models of one seed and the attacks that use their predictions."""

    def __init__(
        self,
        ctx: RunContext,
        problem: Problem,
        num_shadows: int,
        report_progress: Progress,
    ):
        """Samples the halves of the shadow models and the retain rows to predict."""
        self._ctx, self._problem, self._report = ctx, problem, report_progress
        rng = np.random.default_rng([problem.seed, 0x4E7])
        retain = problem.sets.retain
        num_rows = min(_MAX_RETAIN_ROWS, len(retain))
        self._retain_rows = np.sort(rng.choice(retain, num_rows, replace=False))
        duplicates = ctx.config.unlearn.duplicates
        self._plan = shadow_models.plan_shadows(
            ctx.data, problem.sets, num_shadows, problem.seed, duplicates
        )
        self._ids = ctx.data.id[self._plan.rows]
        self._has_image = ctx.data.has_image[self._plan.rows]
        self._folder = ctx.workdir / "shadows" / str(problem.seed)
        self._originals: list[Predictions] = []

    def measure(self, method: str) -> dict[str, Any]:
        """Audits a method, see `audit`; the first call trains the shadow models."""
        costs = {"shadow models": 0.0}
        start_s = time.perf_counter()
        if not self._originals:
            self._train()
            costs["shadow models"] = time.perf_counter() - start_s
        models = load_outputs(self._ctx.workdir, method, self._problem.seed)
        start_s = time.perf_counter()
        result = self.audit(method, models)
        costs["method on shadow models"] = time.perf_counter() - start_s
        return {"pool": result, "costs_s": costs}

    def _train(self) -> None:
        ctx, num_shadows = self._ctx, self._plan.num_shadows
        batch_size = ctx.config.run.shadow_batch_size
        if not batch_size:  # CPUs gain nothing from vectorizing over models
            batch_size = 1 if jax.default_backend() == "cpu" else num_shadows
        report = functools.partial(self._report, "training shadow models")
        self._params = shadow_models.train_shadows(
            ctx, self._problem, self._plan, self._folder, batch_size, report
        )
        self._digests = [checkpoint.hash_tree(params) for params in self._params]
        self._originals = [self._predict("original", i) for i in range(num_shadows)]

    def audit(self, method: str, models: dict[str, Predictions]) -> dict[str, Any]:
        """Returns the results of a method by view, as plain JSON.

        `lira` compares the method's model with shadow models that were trained on a row
        and with those that were not, `rmia` with the latter. The others need the method
        run on every shadow model, and are None for models trained from scratch: `ulira`
        attacks each unlearned shadow model with the others, `ulira_of` the models with
        all of them; `forgetting_score`, `final_score` and `klom` compare pools;
        `one_run` bounds epsilon by one unlearned shadow model, `one_run_control` by one
        that was trained on other rows. `models` are the predictions of the method's
        model, named "model", and of the models it is compared with.
        """
        model, plan, is_in = models["model"], self._plan, self._plan.is_in
        is_member = np.isin(self._ids, model.id[model.split == "unlearn"])
        margins = {name: self._compute_margins(x) for name, x in models.items()}
        originals = self._compute_pool_margins(self._originals)
        distances = "forgetting_score", "final_score", "klom"
        results: dict[str, Any] = {
            "shadows": plan.num_shadows,
            "lira": self._run_lira(originals, margins["model"], is_member),
            "rmia": self._run_rmia(model, is_member),
            **dict.fromkeys(("ulira", "ulira_of", *distances, "one_run")),
            "one_run_control": self._bound_epsilon(originals[2], originals),
        }
        if method == "original":
            results["one_run"] = self._bound_epsilon(originals[0], originals)
        if method not in REFERENCES:
            predictions, total = [], plan.num_shadows
            for number in range(total):
                self._report(f"{method} on shadow models", number, total)
                predictions.append(self._predict(method, number))
            self._report(f"{method} on shadow models", total, total)
            unlearned = self._compute_pool_margins(predictions)
            # The two models of a pair share the rows: see `lira_leave_one_out`.
            pairs = np.arange(total) // 2
            scores = lira.lira_leave_one_out(unlearned, is_in, ~is_in, sets=pairs)
            results["ulira"] = lira.evaluate_pool(scores, is_in, groups=plan.group)
            results["ulira_of"] = {
                name: self._run_lira(unlearned, target, is_member)
                for name, target in margins.items()
            }
            results |= self._compare_pools(unlearned, originals, predictions)
            results["one_run"] = self._bound_epsilon(unlearned[0], originals)
        return _to_json({_VIEW: results})

    def _run_lira(
        self, pool: np.ndarray, target: np.ndarray, is_member: np.ndarray
    ) -> lira.AttackResult:
        is_in = self._plan.is_in
        inside, outside = (np.where(mask, pool, np.nan) for mask in (is_in, ~is_in))
        return self._evaluate(lira.lira(inside, outside, target), is_member, 0.0)

    def _run_rmia(self, model: Predictions, is_member: np.ndarray) -> lira.AttackResult:
        pool_inputs = map(self._select_plan_rows, self._originals)
        pool = np.array([true_probability(*inputs) for inputs in pool_inputs])
        pool[self._plan.is_in | ~self._has_image] = np.nan
        population, *populations = (
            true_probability(*_select_split(x, "test"))
            for x in (model, *self._originals)
        )
        target = true_probability(*self._select_plan_rows(model))
        scores = lira.rmia(target, pool, population, np.array(populations))
        return self._evaluate(scores, is_member, None)

    def _evaluate(
        self, scores: lira.AttackScores, is_member: np.ndarray, threshold: float | None
    ) -> lira.AttackResult:
        score = np.where(self._has_image, scores.score, np.nan)
        scores, groups = scores._replace(score=score), self._plan.group
        return lira.evaluate_attack(
            scores, is_member, threshold=threshold, groups=groups
        )

    def _bound_epsilon(
        self, target: np.ndarray, originals: np.ndarray
    ) -> dict[str, Any] | None:
        """Returns a one-run lower bound on epsilon, with planned rows as canaries.

        Half of the canaries are in, whereas the theorem flips a coin for each. The
        signal of a row is the target's margin minus the mean of other shadow models
        that were not trained on it. As a control, a target that was trained without
        regard to this half must have an epsilon of zero.
        """
        plan = self._plan
        is_pair = np.arange(plan.num_shadows) < 2  # shadow model 0 and its pair
        unseen = np.where(plan.is_in | is_pair[:, None], np.nan, originals)
        with warnings.catch_warnings():
            # Rows on which all other shadow models were trained have no mean.
            warnings.simplefilter("ignore", RuntimeWarning)
            score = target - np.nanmean(unseen, axis=0)
        is_known = np.isfinite(score)
        if not is_known.any():
            return None
        # Rows of a group are in or out together, so they are one canary.
        _, canary = np.unique(plan.group[is_known], return_inverse=True)
        size = np.bincount(canary)
        mean = np.bincount(canary, score[is_known]) / size
        is_in = np.bincount(canary, plan.is_in[0][is_known]) > size / 2
        num_shadows = plan.num_shadows // 2 - 1  # that were not trained on a row
        return one_run_audit(mean, is_in)._asdict() | {"shadows": num_shadows}

    def _compare_pools(
        self,
        unlearned: np.ndarray,
        originals: np.ndarray,
        predictions: list[Predictions],
    ) -> dict[str, Any]:
        """Compares models that unlearned a row with models that never saw it.

        The control compares two pools of models that never saw it.
        """
        plan, has_image = self._plan, self._has_image
        is_finite = np.isfinite(unlearned + originals)[:, has_image].all()
        if plan.num_shadows < MIN_SHADOWS_FOR_DISTANCES or not is_finite:
            return {}
        quarter, half = plan.num_shadows // 4, plan.num_shadows // 2
        order = np.argsort(~plan.is_in, axis=0, kind="stable")  # those in come first
        members = np.take_along_axis(unlearned, order, axis=0)[:quarter]
        unseen = np.take_along_axis(originals, order, axis=0)[half:]
        pools = [members, unseen[:quarter], unseen[-quarter:]]
        pools = [margins[:, has_image] for margins in pools]
        groups = plan.group[has_image]
        score = forgetting.forgetting_score(*pools, groups=groups)
        klom, accuracies = {"unlearn": _compute_klom(pools, groups)}, []
        for split in ("retain", "test"):
            # Retain and test rows have the same role for every shadow model. KLOM
            # compares the first half after unlearning with the second half before it;
            # the control compares the first half before it with the same.
            margins, accuracy = _evaluate_pool(predictions, split)
            before, accuracy_before = _evaluate_pool(self._originals, split)
            original = self._originals[0]
            groups = original.group[_is_in_split(original, split)]
            pools = [margins[:half], before[half:], before[:half]]
            klom[split] = _compute_klom(pools, groups)
            accuracies.append((accuracy, accuracy_before))
        final = None
        if score.score is not None and np.isfinite(accuracies).all():
            final = forgetting.final_score(score.score.value, *accuracies)
        return {"forgetting_score": score, "final_score": final, "klom": klom}

    def _predict(self, method: str, number: int) -> Predictions:
        """Returns a shadow model's predictions after `method` unlearned its half."""
        ctx, plan = self._ctx, self._plan
        # The file name has a hash of the model, its half and the predicted rows.
        content = self._digests[number].encode() + self._retain_rows.tobytes()
        content += plan.rows.tobytes() + plan.is_in[number].tobytes()
        digest = hashlib.blake2b(content, digest_size=6).hexdigest()
        path = self._folder / f"{method}-{number}-{digest}.npz"
        steps = self._folder / f"{method}-{number}-{digest}-steps"
        stored = None
        if path.exists():
            try:
                stored = load_predictions(path)
            except UserError as error:  # damaged
                ctx.reporter.warn(str(error))
        if all_agree(stored is not None) and stored is not None:
            return stored
        sets = shadow_models.make_shadow_sets(self._problem, plan, number)
        params = ctx.executor.replicate(self._params[number])
        if method != "original":
            problem = shadow_models.make_shadow_problem(self._problem, number)
            problem = problem._replace(params=params, sets=sets)
            outcome = ctx.loop.run(method, METHODS[method], problem, steps, NullStage())
            params = {**params, **ctx.executor.replicate(outcome.params)}
        sets = sets._replace(retain=self._retain_rows, validation=sets.validation[:0])
        predictions = predict_all_splits(ctx.forward, params, ctx.table, ctx.data, sets)
        if is_primary():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_predictions(path, predictions)
        checkpoint.remove(steps)
        barrier(path.name)
        return predictions

    def _select_plan_rows(self, predictions: Predictions) -> _LabeledLogits:
        index = {name: i for i, name in enumerate(predictions.id.tolist())}
        rows = np.array([index[name] for name in self._ids.tolist()])
        return _select(predictions, rows)

    def _compute_margins(self, predictions: Predictions) -> np.ndarray:
        return membership_signals(*self._select_plan_rows(predictions))["margin"]

    def _compute_pool_margins(self, pool: list[Predictions]) -> np.ndarray:
        """Returns margins `[S, N]` of all shadow models, NaN for rows without image."""
        margins = np.array([self._compute_margins(predictions) for predictions in pool])
        margins[:, ~self._has_image] = np.nan
        return margins


def _select(predictions: Predictions, rows: np.ndarray) -> _LabeledLogits:
    logits, labels = predictions.logits[_VIEW][rows], predictions.labels[rows]
    return logits, labels, predictions.multi_label


def _is_in_split(predictions: Predictions, split: str) -> np.ndarray:
    return (predictions.split == split) & predictions.has_modalities(_VIEW)


def _select_split(predictions: Predictions, split: str) -> _LabeledLogits:
    return _select(predictions, _is_in_split(predictions, split))


def _evaluate_pool(pool: list[Predictions], split: str) -> tuple[np.ndarray, float]:
    """Returns the margins `[S, N]` of a pool on a split, and its mean accuracy."""
    selected = [_select_split(predictions, split) for predictions in pool]
    margins = np.array([membership_signals(*inputs)["margin"] for inputs in selected])
    scores = [row_scores(*inputs) for inputs in selected]
    return margins, float(np.mean(scores)) if np.size(scores) else np.nan


def _compute_klom(pools: list[np.ndarray], groups: np.ndarray) -> dict[str, Any]:
    """Returns mean and 95 % quantile of KLOM, with controls."""
    return {
        "mean": forgetting.klom(*pools, groups=groups),
        "quantile_95": forgetting.klom(*pools, quantile=0.95, groups=groups),
    }


def _to_json(value: Any) -> Any:
    """Returns nested dicts and NamedTuples of intervals and numbers as plain JSON."""
    if isinstance(value, Interval):
        return to_list(value)
    value = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(value, dict):
        return {name: _to_json(x) for name, x in value.items()}
    return value
