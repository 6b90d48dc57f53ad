"""Audits with a pool of shadow models: U-LiRA, LiRA, RMIA, and distances of pools.

The pool is trained once for a seed (`shadows.py`). Then a method is run on every
shadow, to make it forget all that it was shown: of each row there are models that knew
it and forgot it, and models that never saw it. What the method's own model says of the
row is compared with both.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ccu_jax import evaluate, shadows
from ccu_jax.audits import attacks, epsilon, forgetting, shadow
from ccu_jax.evaluate import Results
from ccu_jax.methods import METHODS, REFERENCES, Problem
from ccu_jax.parallel import barrier, is_first
from ccu_jax.progress import Quiet
from ccu_jax.report import atomically

# The fused view would tell of texts, too: a shadow knows those of the unlearn set in
# any case, those of unseen rows only with the pictures.
VIEWS = ("image",)


class Pool:
    """The shadows of a seed, and what they say, as they are and unlearned.

    Args:
        bench: the `stages.Bench`.
        problem: of the seed.
        count: of shadows, even.
        together: how many are trained in one program.
        tell: told what is done, and how much of how much.
    """

    def __init__(  # noqa: D107  the class says it
        self,
        bench,
        problem: Problem,
        count: int,
        together: int,
        tell: Callable[[str, int, int], None],
    ):
        self._bench, self._problem, self._tell = bench, problem, tell
        duplicates = bench.config.unlearn.duplicates
        self._plan = shadows.plan(
            bench.data, problem.sets, count, problem.seed, duplicates
        )
        self._folder = bench.workdir / "shadows" / str(problem.seed)
        self._params = shadows.train(
            bench,
            problem,
            self._plan,
            self._folder,
            together,
            lambda done, of: tell("training shadows", done, of),
        )
        self._plain = [self._said("original", n) for n in range(count)]

    @property
    def count(self) -> int:
        """Number of shadows."""
        return self._plan.count

    def audit(self, method: str, model: Results) -> dict[str, Any]:
        """What the pool tells of a method's model, as plain JSON.

        `lira`: shadows that know the rows against shadows that do not; `rmia`, with the
        latter; `ulira`, `forgetting_score`, `klom` with the method run on every shadow
        (None for models that were trained from scratch); `one_run` by one of these.
        """
        unlearned = None
        if method not in REFERENCES:
            unlearned = []
            for number in range(self.count):
                self._tell(f"{method} on shadows", number, self.count)
                unlearned.append(self._said(method, number))
            self._tell(f"{method} on shadows", self.count, self.count)
        return {view: self._view(method, view, model, unlearned) for view in VIEWS}

    def _view(self, method, view, model, unlearned):
        members = np.isin(self._ids(), model.id[model.of == "unlearn"])
        target = self._margins(view, model)
        plain = np.array([self._margins(view, said) for said in self._plain])
        shown = self._plan.shown
        # Rows without a picture were never shown to anybody.
        plain[:, ~self._there()] = np.nan
        out = np.where(shown, np.nan, plain)
        told = {
            "shadows": self.count,
            "lira": self._attack(np.where(shown, plain, np.nan), out, target, members),
            "rmia": self._rmia(view, model, members),
            "ulira": None,
            "forgetting_score": None,
            "klom": None,
            "one_run": None,
            "one_run_control": self._one_run(plain[2], 0, plain),
        }
        if method == "original":
            told["one_run"] = self._one_run(plain[0], 0, plain)
        if unlearned is not None:
            gone = np.array([self._margins(view, said) for said in unlearned])
            never = np.where(shown, np.nan, gone)
            told["ulira"] = self._attack(
                np.where(shown, gone, np.nan), never, target, members
            )
            told |= self._distances(gone, plain)
            told["one_run"] = self._one_run(gone[0], 0, plain)
        return told

    def _attack(self, inside, outside, target, members):
        usable = self._there()
        found = shadow.measure(shadow.lira(inside, outside, target), members & usable)
        return _plain(found)

    def _rmia(self, view, model, members):
        plain = np.array([self._truth(view, said) for said in self._plain])
        known = np.where(self._plan.shown, 0, plain).sum(axis=0, keepdims=True)
        known /= (~self._plan.shown).sum(axis=0)  # half of the pool
        population = [self._population(view, said) for said in (model, *self._plain)]
        known[:, ~self._there()] = np.nan
        scored = shadow.rmia(
            self._truth(view, model), known, population[0], np.array(population[1:])
        )
        scored = scored._replace(shadows=self.count)
        return _plain(shadow.measure(scored, members, threshold=None))

    def _one_run(self, target, number, plain):
        """Epsilon at least, by what one shadow was shown: its rows are the canaries.

        As many were shown as were not, where the theorem has a coin for each; a row's
        signal is less what other shadows say that were not shown it. The control asks
        a model that was trained without a look at this half: it must come to nothing.
        """
        others = np.arange(self.count) // 2 != number // 2
        never = np.where(self._plan.shown | ~others[:, None], np.nan, plain)
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
        return epsilon.one_run_audit(mean, shown)._asdict()

    def _distances(self, gone, plain):
        """Unlearned against never seen, and never seen against never seen."""
        shown, there = self._plan.shown, self._there()
        each = self.count // 4
        usable = (
            np.isfinite(gone[:, there]).all() and np.isfinite(plain[:, there]).all()
        )
        if each < 3 or not usable:
            return {}
        order = np.argsort(~shown, axis=0, kind="stable")  # first those that saw it
        unlearned = np.take_along_axis(gone, order, axis=0)[:each]
        never = np.take_along_axis(plain, order, axis=0)[self.count // 2 :]
        pools = [x[:, there] for x in (unlearned, never[:each], never[-each:])]
        return {
            "forgetting_score": _plain(forgetting.forgetting_score(*pools)),
            "klom": _plain(forgetting.klom(*pools)),
        }

    def _said(self, method, number) -> Results:
        """What a shadow says of all rows, as it is or after it was made to forget."""
        path = self._folder / f"{method}-{number}.npz"
        if path.exists():
            return evaluate.load(path)
        sets = shadows.forgetting(self._problem, self._plan, number)
        given = shadows.problem_of(self._problem, self._plan, number)
        params = self._bench.executor.place(self._params[number])
        if method != "original":
            given = given._replace(params=params, sets=sets, store=None)
            steps = self._folder / f"{method}-{number}-steps"
            outcome = self._bench.loop.run(
                method, METHODS[method], given, steps, Quiet()
            )
            params = {**params, **self._bench.executor.place(outcome.params)}
        # Only the rows in question, and the population.
        sets = sets._replace(retain=sets.retain[:0], validation=sets.validation[:0])
        bench = self._bench
        said = evaluate.results(bench.forward, params, bench.table, bench.data, sets)
        if is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            atomically(path, evaluate.to_bytes(said))
        barrier(path.name)
        return said

    def _ids(self):
        return self._bench.data.id[self._plan.rows]

    def _there(self):
        return self._bench.data.has_image[self._plan.rows]

    def _in_order(self, said: Results):
        where = {name: place for place, name in enumerate(said.id.tolist())}
        return np.array([where[name] for name in self._ids().tolist()])

    def _margins(self, view, said: Results):
        at = self._in_order(said)
        told = attacks.signals(said.logits[view][at], said.labels[at], said.multi_label)
        return told["margin"]

    def _truth(self, view, said: Results):
        at = self._in_order(said)
        return shadow.true_probability(
            said.logits[view][at], said.labels[at], said.multi_label
        )

    def _population(self, view, said: Results):
        at = (said.of == "test") & said.shown("image")
        return shadow.true_probability(
            said.logits[view][at], said.labels[at], said.multi_label
        )


def _plain(value):
    """A NamedTuple of intervals as plain JSON."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        if tuple(value._fields) == ("value", "low", "high"):
            return [float(x) for x in value]
        return {name: _plain(x) for name, x in value._asdict().items()}
    return value
