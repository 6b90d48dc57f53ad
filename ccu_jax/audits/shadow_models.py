"""A pool of shadow models: originals that were shown half of the rows in question.

The rows in question are those of the unlearn set and the unseen ones. Each shadow is
trained as `retrain_visual` is, and was shown the pictures of a random half of them: so
of each row there are as many models that know its picture as models that do not, and
these know what a model may know that was asked to forget it. The pool is trained once
for a seed and serves every method.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax import errors
from ccu_jax.distributed import device_tables, preemption
from ccu_jax.distributed import executors as parallel
from ccu_jax.methods import Problem, reference
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import NullStage
from ccu_jax.train import checkpoint, step
from ccu_jax.train.program import Program, State
from ccu_jax.unlearn_sets import splits as unlearn_set
from ccu_jax.unlearn_sets.splits import Sets

NAME = "shadow"
_STEPS = 32  # in one call


class Plan(NamedTuple):
    """Which shadow is shown which rows.

    `rows` `[N]` in question, sorted; `shown` bool `[S, N]`; `group` `[N]`, numbers of
    rows that are shown together.
    """

    rows: np.ndarray
    shown: np.ndarray
    group: np.ndarray

    @property
    def count(self) -> int:
        """Number of shadows."""
        return len(self.shown)


def plan(data, sets: Sets, count: int, seed: int, duplicates: str) -> Plan:
    """Draw what an even number of shadows are shown: each pair shares the rows.

    Rows that are forgotten together go together.
    """
    rows = np.sort(np.concatenate([sets.unlearn, sets.unseen]))
    group = unlearn_set.merge_near_duplicates(data, duplicates)[rows]
    names, place = np.unique(group, return_inverse=True)
    size = np.bincount(place)
    shown = []
    for pair in range(count // 2):
        rng = np.random.default_rng([seed, 0x5AD0, pair])
        order = rng.permutation(len(names))
        # The first groups that come to half of the rows, as nearly as can be.
        half = np.cumsum(size[order]) - size[order] / 2 <= len(rows) / 2
        mine = np.isin(place, order[half])
        shown += [mine, ~mine]
    return Plan(rows, np.array(shown).reshape(-1, len(rows)), place)


def problem_of(problem: Problem, plan: Plan, number: int) -> Problem:
    """What shadow `number` is trained with, and with a number of its own for chance.

    And what a method is given that is to make the shadow forget: all that it was shown.
    """
    text = f"{problem.seed}/{NAME}/{number}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 34
    return problem._replace(seed=seed, method=NAME, params=None, store=None)


def forgetting(problem: Problem, plan: Plan, number: int) -> Sets:
    """The sets of a method that makes shadow `number` forget all that it was shown."""
    shown = plan.shown[number]
    return problem.sets._replace(unlearn=plan.rows[shown], unseen=plan.rows[~shown])


def train(
    ctx,
    problem: Problem,
    plan: Plan,
    folder: pathlib.Path,
    together: int,
    tell: Callable[[int, int], None],
) -> list[Any]:
    """The parameters of all shadows; those that are there are not trained again.

    Args:
        ctx: the context of the run.
        problem: of the seed.
        plan: of the shadows.
        folder: of their checkpoints.
        together: how many are trained in one program, fewer where the devices' memory
            does not hold so many; 1: one after another.
        tell: told how many of how many are done.
    """
    shapes = jax.eval_shape(ctx.model.init, jax.random.key(0))
    found: dict[int, Any] = {}
    for number in range(plan.count):
        known = _facts(ctx, plan, [number])
        saved = checkpoint.restore(folder / str(number), shapes, ctx.reporter.warn)
        if saved is not None and saved.facts == known:
            found[number] = saved.tree
    missing = [number for number in range(plan.count) if number not in found]
    tell(len(found), plan.count)
    pool = Together(ctx, plan)
    while missing:
        some = missing[:together]
        programs = [
            functools.partial(
                reference.train_shadow, shown=plan.rows[plan.shown[number]]
            )
            for number in some
        ]
        given = [problem_of(problem, plan, number) for number in some]
        steps = folder / f"{'-'.join(map(str, some))}-steps"
        if len(some) == 1:
            outcome = ctx.loop.run(NAME, programs[0], given[0], steps, NullStage())
            trained = [outcome.params]
        else:
            made = [make(one) for make, one in zip(programs, given, strict=True)]
            trained = pool.train(made, given, some, steps)
            if trained is None:
                together = len(some) // 2
                continue
        for number, params in zip(some, trained, strict=True):
            known = _facts(ctx, plan, [number])
            checkpoint.save(folder / str(number), 0, params, known, keep=1)
            found[number] = jax.device_get(params)
        checkpoint.remove(steps)
        missing = missing[len(some) :]
        tell(len(found), plan.count)
    return [found[number] for number in range(plan.count)]


def _facts(ctx: RunContext, plan, numbers):
    """Whose a checkpoint is: of which data, and what the shadows were shown."""
    shown = np.packbits(plan.shown[numbers]).tobytes() + plan.rows.tobytes()
    digest = hashlib.blake2b(shown, digest_size=16).hexdigest()
    return {"shown": digest, "fingerprint": ctx.data.fingerprint}


class Together:
    """Trains programs that differ in numbers alone as one, and takes them apart.

    Args:
        ctx: the context of the run.
        plan: of the shadows.
    """

    def __init__(self, ctx: RunContext, plan: Plan):  # noqa: D107  the class says it
        self._ctx, self._plan = ctx, plan
        self._compiled: dict[int, Any] = {}

    def train(
        self,
        programs: list[Program],
        problems: list[Problem],
        numbers: list[int],
        folder: pathlib.Path,
    ) -> list[Any] | None:
        """The parameters of each, or None where memory does not hold so many.

        Args:
            programs: of as many shadows.
            problems: theirs.
            numbers: theirs.
            folder: of the checkpoints in between.
        """
        executor, first = self._ctx.executor, programs[0]
        # Only what each is shown differs between their tables.
        shared = {name: x for name, x in first.table.items() if name != "visual"}
        table = {
            **device_tables.device_columns(shared),
            "visual": np.stack([np.asarray(p.table["visual"]) for p in programs]),
        }
        frozen, _, counts, told = step.static_inputs(first)
        resident = executor.replicate((frozen, table, counts, told))

        def share(begin):
            rows = np.stack([p.plan["rows"][begin : begin + _STEPS] for p in programs])
            rows = np.pad(rows, ((0, 0), (0, _STEPS - rows.shape[1]), (0, 0)))
            index = {"rows": device_tables.send_rows(executor, shared, rows, 2)}
            return {"sharded_tables": {}, "index": index}

        state = executor.replicate(_first(programs, problems))
        run = self._program(len(programs), first, state, resident, share(0))
        if run is None:
            return None
        facts = _facts(self._ctx, self._plan, numbers)
        saved = checkpoint.restore(folder, state, self._ctx.reporter.warn)
        begin = 0
        if saved is not None and saved.facts == facts:
            state, begin = executor.replicate(saved.tree), saved.step
        every = self._ctx.config.run.checkpoint_steps
        with preemption.working():
            for start in range(begin, first.steps, _STEPS):
                state, _ = run(state, resident, share(start))
                done = min(start + _STEPS, first.steps)
                if done == first.steps:  # who is told meanwhile is heard
                    jax.block_until_ready(state)
                leaving = preemption.due(last=done == first.steps)
                if leaving or (done < first.steps and done // every > start // every):
                    checkpoint.save(folder, done, state, facts, keep=1)
                if leaving:
                    raise errors.Preempted
        params = jax.device_get(state.params)
        return [
            jax.tree.map(lambda x, place=place: x[place], params)
            for place in range(len(programs))
        ]

    def _program(self, count, first, state, resident, share):
        """What trains so many together, or None where the devices cannot hold it."""
        if count not in self._compiled:
            run = self._ctx.executor.compile(_pool(first), donate=True)
            made = run.lower(state, resident, share).compile()
            needs = made.memory_analysis()
            held = 0 if needs is None else needs.temp_size_in_bytes
            held += sum(x.nbytes for x in jax.tree.leaves(state))
            self._compiled[count] = made if parallel.fits(held) else None
        return self._compiled[count]


def _first(programs, problems) -> State:
    """The first state of all programs, each leaf stacked."""
    start = jax.jit(step.make_init(programs[0].optimizer, programs[0].group))
    states = [
        start(p.params, p.aux, one.key("steps"))
        for p, one in zip(programs, problems, strict=True)
    ]
    stacked = jax.tree.map(lambda *x: np.stack(jax.device_get(x)), *states)
    return stacked._replace(step=np.int32(0))


def _pool(program: Program) -> Callable:
    """`step.make_steps` over a leading axis of models; they take each step together."""
    one = step.make_steps(program)
    state = State(step=None, params=0, opt=0, aux=0, key=0)
    columns = dict.fromkeys(device_tables.device_columns(program.table)) | {"visual": 0}
    resident = (None, columns, None, None)
    share = {"sharded_tables": None, "index": 0}

    def fn(given, kept, batch):
        out, told = jax.vmap(
            one, in_axes=(state, resident, share), out_axes=(state, 0)
        )(given, kept, batch)
        return out, told

    return fn
