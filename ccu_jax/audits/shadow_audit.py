"""Attacks with shadow models: U-LiRA, LiRA, RMIA, one-run epsilon, pool distances.

The shadow models are trained once per seed (`shadow_models.py`). Then a method is run
on each of them and unlearns all images of its half, so that every row has models that
unlearned it and models that never saw it. The method's own model is compared with both.
"""

import hashlib
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ccu_jax.audits import shadow_models
from ccu_jax.distributed.hosts import all_agree, barrier, is_primary
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

# The other views read texts, and shadow models know those of the unlearn set in any
# case but those of unseen rows only together with the image.
VIEW = "image"
MIN_SHADOWS_FOR_DISTANCES = 12  # pools are a quarter of them, with at least 3 models
_MAX_RETAIN_ROWS = 500


class ShadowPool:
    """The shadow models of a seed and their predictions, before and after unlearning.

    Attributes:
        seconds: duration of training and predicting, without what was stored before.
    """

    def __init__(
        self,
        ctx: RunContext,
        problem: Problem,
        num_shadows: int,
        batch_size: int,
        report_progress: Callable[[str, int, int], None],
    ):
        """Trains the shadow models, `batch_size` in one program, and predicts."""
        start = time.perf_counter()
        self._ctx, self._problem, self._report = ctx, problem, report_progress
        rng = np.random.default_rng([problem.seed, 0x4E7])
        retain = problem.sets.retain
        num_rows = min(_MAX_RETAIN_ROWS, len(retain))
        self._retain_rows = np.sort(rng.choice(retain, num_rows, replace=False))
        duplicates = ctx.config.unlearn.duplicates
        self._plan = shadow_models.plan_shadows(
            ctx.data, problem.sets, num_shadows, problem.seed, duplicates
        )
        self._folder = ctx.workdir / "shadows" / str(problem.seed)
        self._params = shadow_models.train_shadows(
            ctx,
            problem,
            self._plan,
            self._folder,
            batch_size,
            lambda done, total: report_progress("training shadow models", done, total),
        )
        self._digests = [checkpoint.digest(params) for params in self._params]
        numbers = range(num_shadows)
        self._originals = [self._predict("original", number) for number in numbers]
        self.seconds = time.perf_counter() - start

    def audit(self, method: str, models: dict[str, Predictions]) -> dict[str, Any]:
        """Returns the results of a method by view, as plain JSON.

        `lira` compares the method's model with shadow models that were trained on a row
        and with those that were not, `rmia` with the latter. The others need the method
        run on every shadow model, and are None for models trained from scratch: `ulira`
        attacks each unlearned shadow model with the others, `ulira_of` the models with
        all of them; `forgetting_score`, `final_score` and `klom` compare pools;
        `one_run` bounds epsilon by one unlearned shadow model, `one_run_control` by one
        that was trained on other rows.

        Args:
            method: its name.
            models: predictions of its model, named "model", and of others to compare.
        """
        model = models["model"]
        is_member = np.isin(self._ids(), model.id[model.split == "unlearn"])
        margins = {name: self._margins(x) for name, x in models.items()}
        originals = self._pool_margins(self._originals)
        results: dict[str, Any] = {
            "shadows": self._plan.num_shadows,
            "lira": self._lira(originals, margins["model"], is_member),
            "rmia": self._rmia(model, is_member),
            **dict.fromkeys(("ulira", "ulira_of", "forgetting_score", "final_score")),
            "klom": None,
            "one_run": None,
            "one_run_control": self._one_run(originals[2], originals),
        }
        if method == "original":
            results["one_run"] = self._one_run(originals[0], originals)
        if method not in REFERENCES:
            predictions = self._unlearn_all(method)
            unlearned, is_in = self._pool_margins(predictions), self._plan.is_in
            # The two models of a pair share the rows: see `lira_leave_one_out`.
            pairs = np.arange(self._plan.num_shadows) // 2
            scores = lira.lira_leave_one_out(unlearned, is_in, ~is_in, sets=pairs)
            ulira = lira.evaluate_pool(scores, is_in, groups=self._plan.group)
            results["ulira"] = _to_json(ulira)
            results["ulira_of"] = {
                name: self._lira(unlearned, target, is_member)
                for name, target in margins.items()
            }
            results |= self._distances(unlearned, originals, predictions)
            results["one_run"] = self._one_run(unlearned[0], originals)
        return {VIEW: results}

    def _unlearn_all(self, method: str) -> list[Predictions]:
        """Runs a method on every shadow model."""
        total, predictions = self._plan.num_shadows, []
        for number in range(total):
            self._report(f"{method} on shadow models", number, total)
            predictions.append(self._predict(method, number))
        self._report(f"{method} on shadow models", total, total)
        return predictions

    def _lira(self, pool: np.ndarray, target: np.ndarray, is_member: np.ndarray):
        inside = np.where(self._plan.is_in, pool, np.nan)
        outside = np.where(self._plan.is_in, np.nan, pool)
        return self._evaluate(lira.lira(inside, outside, target), is_member)

    def _evaluate(
        self, scores: lira.AttackScores, is_member: np.ndarray, **kwargs: Any
    ):
        score = np.where(self._has_image(), scores.score, np.nan)
        scores, groups = scores._replace(score=score), self._plan.group
        return _to_json(
            lira.evaluate_attack(scores, is_member, groups=groups, **kwargs)
        )

    def _rmia(self, model: Predictions, is_member: np.ndarray):
        pool = np.array([self._true_probability(x) for x in self._originals])
        pool[self._plan.is_in | ~self._has_image()] = np.nan
        population = true_probability(*_select(model, "test"))
        populations = [true_probability(*_select(x, "test")) for x in self._originals]
        target = self._true_probability(model)
        scores = lira.rmia(target, pool, population, np.array(populations))
        return self._evaluate(scores, is_member, threshold=None)

    def _one_run(self, target: np.ndarray, originals: np.ndarray):
        """Returns the epsilon lower bound by the half of shadow model 0 as canaries.

        Half of the canaries are in, whereas the theorem flips a coin for each. The
        signal of a row is the target's margin minus the mean of other shadow models
        that were not trained on it. As a control, a target that was trained without
        regard to this half must have an epsilon of zero.
        """
        is_other = np.arange(self._plan.num_shadows) >= 2  # 0 and 1 are a pair
        never = np.where(self._plan.is_in | ~is_other[:, None], np.nan, originals)
        with warnings.catch_warnings():
            # A row that is in all other shadow models has no mean.
            warnings.simplefilter("ignore", RuntimeWarning)
            score = target - np.nanmean(never, axis=0)
        is_known = np.isfinite(score)
        if not is_known.any():
            return None
        # Rows of a group are in or out together, so they are one canary.
        _, canary = np.unique(self._plan.group[is_known], return_inverse=True)
        size = np.bincount(canary)
        mean = np.bincount(canary, score[is_known]) / size
        is_in = np.bincount(canary, self._plan.is_in[0][is_known]) > size / 2
        num_shadows = self._plan.num_shadows // 2 - 1  # that were not trained on a row
        return one_run_audit(mean, is_in)._asdict() | {"shadows": num_shadows}

    def _distances(
        self,
        unlearned: np.ndarray,
        originals: np.ndarray,
        predictions: list[Predictions],
    ) -> dict[str, Any]:
        """Compares pools: unlearned with never seen, and two never seen as control."""
        plan, has_image = self._plan, self._has_image()
        is_finite = np.isfinite(unlearned + originals)[:, has_image].all()
        if plan.num_shadows < MIN_SHADOWS_FOR_DISTANCES or not is_finite:
            return {}
        quarter, half = plan.num_shadows // 4, plan.num_shadows // 2
        order = np.argsort(~plan.is_in, axis=0, kind="stable")  # those in come first
        forgot = np.take_along_axis(unlearned, order, axis=0)[:quarter]
        never = np.take_along_axis(originals, order, axis=0)[half:]
        pools = [x[:, has_image] for x in (forgot, never[:quarter], never[-quarter:])]
        groups = plan.group[has_image]
        forgot, never, control = pools
        score = forgetting.forgetting_score(forgot, never, control, groups=groups)
        klom, accuracies = {"unlearn": _klom(pools, groups)}, []
        for split in ("retain", "test"):
            # Retain and test rows have the same role for every shadow model. KLoM
            # compares the first half after unlearning with the second half before it;
            # the control compares the first half before it with the same.
            margins, accuracy = _pool_on_split(predictions, split)
            before, accuracy_before = _pool_on_split(self._originals, split)
            original = self._originals[0]
            groups = original.group[_rows_of_split(original, split)]
            klom[split] = _klom([margins[:half], before[half:], before[:half]], groups)
            accuracies.append((accuracy, accuracy_before))
        final = None
        if score.score is not None and np.isfinite(accuracies).all():
            final = forgetting.final_score(score.score.value, *accuracies)
        return {
            "forgetting_score": _to_json(score),
            "final_score": final,
            "klom": klom,
        }

    def _predict(self, method: str, number: int) -> Predictions:
        """Returns a shadow model's predictions after it unlearned its half."""
        ctx, plan = self._ctx, self._plan
        # The file name depends on the model, its half and the predicted rows.
        content = self._digests[number].encode() + self._retain_rows.tobytes()
        content += plan.rows.tobytes() + plan.is_in[number].tobytes()
        digest = hashlib.blake2b(content, digest_size=6).hexdigest()
        path = self._folder / f"{method}-{number}-{digest}.npz"
        steps = self._folder / f"{method}-{number}-{digest}-steps"
        stored = _load_if_intact(path, ctx.reporter.warn)
        if all_agree(stored is not None) and stored is not None:
            return stored
        sets = shadow_models.shadow_sets(self._problem, plan, number)
        params = ctx.executor.replicate(self._params[number])
        if method != "original":
            problem = shadow_models.shadow_problem(self._problem, number)
            problem = problem._replace(params=params, sets=sets)
            outcome = ctx.loop.run(method, METHODS[method], problem, steps, NullStage())
            params = {**params, **ctx.executor.replicate(outcome.params)}
        sets = sets._replace(retain=self._retain_rows, validation=sets.validation[:0])
        predictions = predict_all_splits(ctx.forward, params, ctx.table, ctx.data, sets)
        if is_primary():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_predictions(path, predictions)
        if method != "original":
            checkpoint.remove(steps)
        barrier(path.name)
        return predictions

    def _ids(self) -> np.ndarray:
        return self._ctx.data.id[self._plan.rows]

    def _has_image(self) -> np.ndarray:
        return self._ctx.data.has_image[self._plan.rows]

    def _plan_rows(self, predictions: Predictions):
        """Returns logits, labels and label type of the rows of the plan."""
        index = {name: i for i, name in enumerate(predictions.id.tolist())}
        rows = np.array([index[name] for name in self._ids().tolist()])
        logits, labels = predictions.logits[VIEW][rows], predictions.labels[rows]
        return logits, labels, predictions.multi_label

    def _margins(self, predictions: Predictions) -> np.ndarray:
        return membership_signals(*self._plan_rows(predictions))["margin"]

    def _pool_margins(self, pool: list[Predictions]) -> np.ndarray:
        """Returns margins `[S, N]`, NaN for rows without image: no model saw one."""
        margins = np.array([self._margins(predictions) for predictions in pool])
        margins[:, ~self._has_image()] = np.nan
        return margins

    def _true_probability(self, predictions: Predictions) -> np.ndarray:
        return true_probability(*self._plan_rows(predictions))


def _pool_on_split(pool: list[Predictions], split: str) -> tuple[np.ndarray, float]:
    """Returns the models' margins on a split `[S, N]` and their mean accuracy."""
    selected = [_select(predictions, split) for predictions in pool]
    margins = np.array([membership_signals(*inputs)["margin"] for inputs in selected])
    scores = [row_scores(*inputs) for inputs in selected]
    return margins, float(np.mean(scores)) if np.size(scores) else np.nan


def _rows_of_split(predictions: Predictions, split: str) -> np.ndarray:
    return (predictions.split == split) & predictions.available(VIEW)


def _select(
    predictions: Predictions, split: str
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Returns logits, labels and label type of the rows of a split."""
    rows = _rows_of_split(predictions, split)
    logits, labels = predictions.logits[VIEW][rows], predictions.labels[rows]
    return logits, labels, predictions.multi_label


def _load_if_intact(
    path: pathlib.Path, warn: Callable[[str], None]
) -> Predictions | None:
    """Returns stored predictions, None if they are missing or damaged."""
    try:
        return load_predictions(path) if path.exists() else None
    except UserError as error:
        warn(str(error))
        return None


def _klom(pools: list[np.ndarray], groups: np.ndarray) -> dict[str, Any]:
    """Returns mean and 95 % quantile of KLOM, with controls."""
    tail = forgetting.klom(*pools, quantile=0.95, groups=groups)
    mean = forgetting.klom(*pools, groups=groups)
    return {"mean": _to_json(mean), "quantile_95": _to_json(tail)}


def _to_json(value: Any) -> Any:
    """Returns a NamedTuple of intervals and numbers as plain JSON."""
    if isinstance(value, Interval):
        return to_list(value)
    if hasattr(value, "_asdict"):
        return {name: _to_json(x) for name, x in value._asdict().items()}
    return value
