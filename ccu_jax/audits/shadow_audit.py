"""Audits with a pool of shadow models: U-LiRA, LiRA, RMIA, and distances of pools.

The pool is trained once for a seed (`shadows.py`). Then a method is run on every
shadow, to make it forget all that it was shown: of each row there are models that knew
it and forgot it, and models that never saw it. What the method's own model says of the
row is compared with both.
"""

import hashlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ccu_jax.audits import shadow_models as shadows
from ccu_jax.distributed.hosts import all_agree, barrier, is_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate import predictions
from ccu_jax.evaluate.predictions import Predictions
from ccu_jax.methods import METHODS, REFERENCES, Problem
from ccu_jax.metrics import forgetting, membership
from ccu_jax.metrics import lira as shadow
from ccu_jax.metrics import membership as attacks
from ccu_jax.metrics import privacy as epsilon
from ccu_jax.metrics import ranking as scores
from ccu_jax.metrics.intervals import Interval, to_list
from ccu_jax.runs.progress import NullStage
from ccu_jax.train import checkpoint

# The fused view would tell of texts, too: a shadow knows those of the unlearn set in
# any case, those of unseen rows only with the pictures.
VIEWS = ("image",)
LEAST = 12  # shadows: three models a side, of each row a quarter of them
_RETAINED = 500  # rows of the retain set, at most, that shadows are asked of


class Pool:
    """The shadows of a seed, and what they say, as they are and unlearned.

    Args:
        ctx: the context of the run.
        problem: of the seed.
        count: of shadows, even.
        together: how many are trained in one program.
        tell: told what is done, and how much of how much.
    """

    def __init__(  # noqa: D107  the class says it
        self,
        ctx,
        problem: Problem,
        count: int,
        together: int,
        tell: Callable[[str, int, int], None],
    ):
        began = time.perf_counter()
        self._ctx, self._tell = ctx, tell
        rng = np.random.default_rng([problem.seed, 0x4E7])
        retained = problem.sets.retain
        retained = rng.choice(retained, min(_RETAINED, len(retained)), replace=False)
        self._retained = np.sort(retained)
        self._problem = problem
        duplicates = ctx.config.unlearn.duplicates
        self._plan = shadows.plan(
            ctx.data, problem.sets, count, problem.seed, duplicates
        )
        self._folder = ctx.workdir / "shadows" / str(problem.seed)
        self._params = shadows.train(
            ctx,
            problem,
            self._plan,
            self._folder,
            together,
            lambda done, of: tell("training shadows", done, of),
        )
        self._digests = [checkpoint.digest(params) for params in self._params]
        self._plain = [self._said("original", n) for n in range(count)]
        # Without those that were there already.
        self.seconds = time.perf_counter() - began

    @property
    def count(self) -> int:
        """Number of shadows."""
        return self._plan.count

    def audit(self, method: str, models: dict[str, Predictions]) -> dict[str, Any]:
        """What the pool tells of a method's model, as plain JSON.

        `lira`: shadows that know the rows against shadows that do not; `rmia`, with the
        latter. With the method run on every shadow (None for models that were trained
        from scratch): `ulira` of these, each with the others as its shadows, and
        `ulira_of` the models; `forgetting_score`, `final_score`, `klom` by set.
        `one_run` by one of these.

        Args:
            method: its name.
            models: `model`, its own, and what it is compared with, by name.
        """
        unlearned = None
        if method not in REFERENCES:
            unlearned = []
            for number in range(self.count):
                self._tell(f"{method} on shadows", number, self.count)
                unlearned.append(self._said(method, number))
            self._tell(f"{method} on shadows", self.count, self.count)
        return {view: self._view(method, view, models, unlearned) for view in VIEWS}

    def _view(self, method, view, models, unlearned):
        model = models["model"]
        members = np.isin(self._ids(), model.id[model.split == "unlearn"])
        targets = {name: self._margins(view, said) for name, said in models.items()}
        plain_ = np.array([self._margins(view, said) for said in self._plain])
        shown = self._plan.shown
        # Rows without a picture were never shown to anybody.
        plain_[:, ~self._there()] = np.nan
        inside, out = self._sides(plain_)
        told = {
            "shadows": self.count,
            "lira": self._attack(inside, out, targets["model"], members),
            "rmia": self._rmia(view, model, members),
            **dict.fromkeys(("ulira", "ulira_of", "forgetting_score", "final_score")),
            "klom": None,
            "one_run": None,
            "one_run_control": self._one_run(plain_[2], 0, plain_),
        }
        if method == "original":
            told["one_run"] = self._one_run(plain_[0], 0, plain_)
        if unlearned is not None:
            gone = np.array([self._margins(view, said) for said in unlearned])
            gone[:, ~self._there()] = np.nan
            # A pair shares the rows: see `lira_leave_one_out`.
            pairs = np.arange(self.count) // 2
            pooled = shadow.lira_leave_one_out(gone, shown, ~shown, sets=pairs)
            group = self._plan.group
            told["ulira"] = _plain(shadow.evaluate_pool(pooled, shown, groups=group))
            told["ulira_of"] = {
                name: self._attack(*self._sides(gone), target, members)
                for name, target in targets.items()
            }
            told |= self._distances(view, gone, plain_, unlearned)
            told["one_run"] = self._one_run(gone[0], 0, plain_)
        return told

    def _sides(self, said):
        """What models say of rows that they were shown, and of the others."""
        shown = self._plan.shown
        return np.where(shown, said, np.nan), np.where(shown, np.nan, said)

    def _attack(self, inside, outside, target, members):
        scored = shadow.lira(inside, outside, target)
        return self._measured(scored, members)

    def _measured(self, scored, members, **more):
        there = self._there()
        scored = scored._replace(score=np.where(there, scored.score, np.nan))
        groups = self._plan.group
        return _plain(shadow.evaluate_attack(scored, members, groups=groups, **more))

    def _rmia(self, view, model, members):
        plain_ = np.array([self._truth(view, said) for said in self._plain])
        never = np.where(self._plan.shown, np.nan, plain_)
        never[:, ~self._there()] = np.nan
        population = [self._population(view, said) for said in (model, *self._plain)]
        scored = shadow.rmia(
            self._truth(view, model), never, population[0], np.array(population[1:])
        )
        return self._measured(scored, members, threshold=None)

    def _one_run(self, target, number, plain_):
        """Epsilon at least, by what one shadow was shown: its rows are the canaries.

        As many were shown as were not, where the theorem has a coin for each; a row's
        signal is less what other shadows say that were not shown it. The control asks
        a model that was trained without a look at this half: it must come to nothing.
        """
        others = np.arange(self.count) // 2 != number // 2
        never = np.where(self._plan.shown | ~others[:, None], np.nan, plain_)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of rows all have seen
            score = target - np.nanmean(never, axis=0)
        known = np.isfinite(score)
        if not known.any():
            return None
        # Rows of a group share a coin, so they are one canary.
        _, place = np.unique(self._plan.group[known], return_inverse=True)
        size = np.bincount(place)
        mean = np.bincount(place, score[known]) / size
        shown = np.bincount(place, self._plan.shown[number][known]) > size / 2
        found = epsilon.one_run_audit(mean, shown)._asdict()
        return found | {"shadows": self.count // 2 - 1}  # that have not seen a row

    def _distances(self, view, gone, plain_, unlearned):
        """Unlearned against never seen, and never seen against never seen."""
        shown, there = self._plan.shown, self._there()
        each = self.count // 4
        usable = (
            np.isfinite(gone[:, there]).all() and np.isfinite(plain_[:, there]).all()
        )
        if self.count < LEAST or not usable:
            return {}
        order = np.argsort(~shown, axis=0, kind="stable")  # first those that saw it
        forgot = np.take_along_axis(gone, order, axis=0)[:each]
        never = np.take_along_axis(plain_, order, axis=0)[self.count // 2 :]
        pools = [x[:, there] for x in (forgot, never[:each], never[-each:])]
        groups = self._plan.group[there]
        quality = forgetting.forgetting_score(*pools, groups=groups)
        klom, kept = {"unlearn": _klom(pools, groups)}, []
        for name in ("retain", "test"):
            # Of these all shadows know as much as each other. Half of them before they
            # unlearned stand for a model that was not asked to; the control is the
            # other half, which is the half whose unlearned models are compared.
            said = [self._of_set(view, name, pool) for pool in (unlearned, self._plain)]
            half = self.count // 2
            (margins, right), (before, usual) = said
            pools = [margins[:half], before[half:], before[:half]]
            klom[name] = _klom(pools, self._groups_of(view, name))
            kept.append((right, usual))
        final = None
        if quality.score is not None and all(map(np.isfinite, sum(kept, ()))):
            final = forgetting.final_score(quality.score.value, *kept)
        return {
            "forgetting_score": _plain(quality),
            "final_score": final,
            "klom": klom,
        }

    def _of_set(self, view, name, pool):
        """The margins of models on a set `[K, N]`, and how right they are."""
        margins, right = [], []
        for said in pool:
            rows = (said.split == name) & said.available(view)
            given = said.logits[view][rows], said.labels[rows], said.multi_label
            margins.append(attacks.membership_signals(*given)["margin"])
            right.append(scores.row_scores(*given))
        return np.array(margins), float(np.mean(right)) if np.size(right) else np.nan

    def _groups_of(self, view, name):
        """The groups of the rows of `_of_set`."""
        said = self._plain[0]
        rows = (said.split == name) & said.available(view)
        return said.group[rows]

    def _said(self, method, number) -> Predictions:
        """What a shadow says of all rows, as it is or after it was made to forget."""
        # Of this very model, asked for these rows: named so, or it is another file.
        given = self._digests[number].encode() + self._retained.tobytes()
        given += self._plan.rows.tobytes() + self._plan.shown[number].tobytes()
        name = hashlib.blake2b(given, digest_size=6).hexdigest()
        path = self._folder / f"{method}-{number}-{name}.npz"
        known = _read(path, self._ctx.reporter.warn)
        if all_agree(known is not None):
            return known
        sets = shadows.forgetting(self._problem, self._plan, number)
        given = shadows.problem_of(self._problem, self._plan, number)
        params = self._ctx.executor.replicate(self._params[number])
        if method != "original":
            given = given._replace(params=params, sets=sets, store=None)
            steps = self._folder / f"{method}-{number}-{name}-steps"
            outcome = self._ctx.loop.run(method, METHODS[method], given, steps, NullStage())
            params = {**params, **self._ctx.executor.replicate(outcome.params)}
        # Only the rows in question, the population, and some that were kept.
        sets = sets._replace(retain=self._retained, validation=sets.validation[:0])
        ctx = self._ctx
        said = predictions.predict_all_splits(
            ctx.forward, params, ctx.table, ctx.data, sets
        )
        if is_primary():
            path.parent.mkdir(parents=True, exist_ok=True)
            predictions.save_predictions(path, said)
        if method != "original":
            checkpoint.remove(steps)
        barrier(path.name)
        return said

    def _ids(self):
        return self._ctx.data.id[self._plan.rows]

    def _there(self):
        return self._ctx.data.has_image[self._plan.rows]

    def _in_order(self, said: Predictions):
        where = {name: place for place, name in enumerate(said.id.tolist())}
        return np.array([where[name] for name in self._ids().tolist()])

    def _margins(self, view, said: Predictions):
        at = self._in_order(said)
        told = attacks.membership_signals(
            said.logits[view][at], said.labels[at], said.multi_label
        )
        return told["margin"]

    def _truth(self, view, said: Predictions):
        at = self._in_order(said)
        return membership.true_probability(
            said.logits[view][at], said.labels[at], said.multi_label
        )

    def _population(self, view, said: Predictions):
        at = (said.split == "test") & said.available("image")
        return membership.true_probability(
            said.logits[view][at], said.labels[at], said.multi_label
        )


def _read(path, warn) -> Predictions | None:
    """Outputs that are there, or None; what is damaged is made again."""
    try:
        return predictions.load_predictions(path) if path.exists() else None
    except UserError as error:
        warn(str(error))
        return None


def _klom(pools, groups):
    """Its mean and its .95 quantile, of unlearned, others, and their control."""
    tail = forgetting.klom(*pools, quantile=0.95, groups=groups)
    mean = forgetting.klom(*pools, groups=groups)
    return {"mean": _plain(mean), "quantile_95": _plain(tail)}


def _plain(value):
    """A NamedTuple of intervals as plain JSON."""
    if isinstance(value, Interval):
        return to_list(value)
    if hasattr(value, "_asdict"):
        return {name: _plain(x) for name, x in value._asdict().items()}
    return value
