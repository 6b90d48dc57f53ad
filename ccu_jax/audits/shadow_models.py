"""Shadow models: originals trained on half of the unlearn set and of the unseen rows.

Each is trained like `retrain_visual`, but also on the images of its half. So every row
is "in" for half of the shadow models, which were trained on its image, and "out" for
the others, which were trained at most on its text, as an unlearned model may be. All
methods share the shadow models of a seed.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax import errors
from ccu_jax.data.dataset import Dataset
from ccu_jax.distributed import device_tables, executors, preemption
from ccu_jax.methods import Problem
from ccu_jax.methods.reference import make_shadow_program
from ccu_jax.models import Params
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import NullStage
from ccu_jax.train import checkpoint, step
from ccu_jax.train.program import Program, State
from ccu_jax.unlearn_sets.splits import Sets, merge_near_duplicates

NAME = "shadow"
_CALL_STEPS = 32


class ShadowPlan(NamedTuple):
    """The assignment of images to shadow models."""

    rows: np.ndarray  # `[N]` unlearned and unseen rows, sorted
    is_in: np.ndarray  # bool `[S, N]` whether a model is trained on a row's image
    group: np.ndarray  # `[N]` group numbers; all rows of a group are in or out

    @property
    def num_shadows(self) -> int:
        """The number S of shadow models."""
        return len(self.is_in)


def plan_shadows(
    data: Dataset, sets: Sets, num_shadows: int, seed: int, duplicates: str
) -> ShadowPlan:
    """Randomly splits the rows into two halves for each pair of shadow models.

    `num_shadows` is even; `duplicates` is the setting `unlearn.duplicates`.
    """
    rows = np.sort(np.concatenate([sets.unlearn, sets.unseen]))
    merged = merge_near_duplicates(data, duplicates)[rows]
    names, group = np.unique(merged, return_inverse=True)
    size = np.bincount(group)
    is_in = []
    for pair in range(num_shadows // 2):
        rng = np.random.default_rng([seed, 0x5AD0, pair])
        order = rng.permutation(len(names))
        # Take the first groups whose total size is closest to half of the rows.
        is_first_half = np.cumsum(size[order]) - size[order] / 2 <= len(rows) / 2
        half = np.isin(group, order[is_first_half])
        is_in += [half, ~half]
    return ShadowPlan(rows, np.array(is_in).reshape(-1, len(rows)), group)


def make_shadow_problem(problem: Problem, number: int) -> Problem:
    """Returns the problem of a shadow model, with its own seed and no parameters."""
    text = f"{problem.seed}/{NAME}/{number}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 34
    return problem._replace(seed=seed, method=NAME, params=None, store=None)


def make_shadow_sets(problem: Problem, plan: ShadowPlan, number: int) -> Sets:
    """Returns the sets of a shadow model, whose half is the unlearn set."""
    is_in = plan.is_in[number]
    return problem.sets._replace(unlearn=plan.rows[is_in], unseen=plan.rows[~is_in])


def train_shadows(
    ctx: RunContext,
    problem: Problem,
    plan: ShadowPlan,
    folder: pathlib.Path,
    batch_size: int,
    report_progress: Callable[[int, int], None],
) -> list[Params]:
    """Trains the shadow models that have no checkpoint; returns all parameters.

    `batch_size` models are trained in one program; it is halved until they fit in
    device memory. `report_progress` gets the number of trained models and the total.
    """
    shapes = jax.eval_shape(ctx.model.init, jax.random.key(0))
    trained: dict[int, Params] = {}
    for number in range(plan.num_shadows):
        saved = checkpoint.restore(folder / str(number), shapes, ctx.reporter.warn)
        if saved is not None and saved.metadata == _make_metadata(ctx, plan, [number]):
            trained[number] = saved.tree
    report_progress(len(trained), plan.num_shadows)
    training = _Training(ctx, problem, plan)
    while missing := [n for n in range(plan.num_shadows) if n not in trained]:
        numbers = missing[:batch_size]
        steps = folder / f"{'-'.join(map(str, numbers))}-steps"
        batch = training.train(numbers, steps)
        if batch is None:
            batch_size = len(numbers) // 2
            continue
        for number, params in zip(numbers, batch, strict=True):
            facts = _make_metadata(ctx, plan, [number])
            checkpoint.save(folder / str(number), 0, params, facts, max_to_keep=1)
            trained[number] = jax.device_get(params)
        checkpoint.remove(steps)
        report_progress(len(trained), plan.num_shadows)
    return [trained[number] for number in range(plan.num_shadows)]


def _make_metadata(
    ctx: RunContext, plan: ShadowPlan, numbers: list[int]
) -> dict[str, str]:
    """Returns checkpoint metadata: the data fingerprint and a hash of the halves."""
    content = np.packbits(plan.is_in[numbers]).tobytes() + plan.rows.tobytes()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return {"images": digest, "fingerprint": ctx.data.fingerprint}


class _Training:
    """Trains one shadow model, or several in one program that is vmapped over them.

    Their programs may differ only in parameters, batches and the `visual` column.
    """

    def __init__(self, ctx: RunContext, problem: Problem, plan: ShadowPlan):
        self._ctx, self._problem, self._plan = ctx, problem, plan
        self._compiled: dict[int, Any] = {}  # by number of models; None: too large

    def train(self, indices: list[int], folder: pathlib.Path) -> list[Params] | None:
        """Trains these models; returns their parameters, or None if out of memory.

        `folder` is for checkpoints.
        """
        plan = self._plan
        problems = [make_shadow_problem(self._problem, index) for index in indices]
        members = [plan.rows[plan.is_in[index]] for index in indices]
        methods = [functools.partial(make_shadow_program, members=x) for x in members]
        if len(indices) == 1:
            loop = self._ctx.loop
            outcome = loop.run(NAME, methods[0], problems[0], folder, NullStage())
            return [outcome.params]
        programs = [f(problem) for f, problem in zip(methods, problems, strict=True)]
        state = self._ctx.executor.replicate(_init_state(programs, problems))
        return self._train_jointly(programs, state, indices, folder)

    def _train_jointly(
        self,
        programs: list[Program],
        state: State,
        numbers: list[int],
        folder: pathlib.Path,
    ) -> list[Params] | None:
        executor, first = self._ctx.executor, programs[0]
        shared = {name: x for name, x in first.table.items() if name != "visual"}
        visual = np.stack([np.asarray(p.table["visual"]) for p in programs])
        table = {**device_tables.device_columns(shared), "visual": visual}
        frozen, _, counts, optimizer_inputs = step.static_inputs(first)
        static = executor.replicate((frozen, table, counts, optimizer_inputs))
        plans = np.stack([p.plan["rows"] for p in programs])

        def make_step_inputs(start: int) -> dict[str, Any]:
            rows = plans[:, start : start + _CALL_STEPS]
            rows = np.pad(rows, ((0, 0), (0, _CALL_STEPS - rows.shape[1]), (0, 0)))
            index = {"rows": device_tables.send_rows(executor, shared, rows, 2)}
            return {"sharded_tables": {}, "index": index}

        run = self._compile(first, len(programs), state, static, make_step_inputs(0))
        if run is None:
            return None
        facts = _make_metadata(self._ctx, self._plan, numbers)
        start = 0
        saved = checkpoint.restore(folder, state, self._ctx.reporter.warn)
        if saved is not None and saved.metadata == facts:
            state, start = executor.replicate(saved.tree), saved.step
        every = self._ctx.config.run.checkpoint_steps
        with preemption.defer_exit():
            for begin in range(start, first.steps, _CALL_STEPS):
                state, _ = run(state, static, make_step_inputs(begin))
                end = min(begin + _CALL_STEPS, first.steps)
                if is_last := end == first.steps:
                    # Wait, so that a signal during the last steps is handled below.
                    jax.block_until_ready(state)
                should_stop = preemption.should_stop()
                if should_stop or (not is_last and end // every > begin // every):
                    checkpoint.save(folder, end, state, facts, max_to_keep=1)
                if should_stop:
                    raise errors.Preempted
        params = jax.device_get(state.params)
        return [jax.tree.map(lambda x, i=i: x[i], params) for i in range(len(programs))]

    def _compile(self, first: Program, count: int, *args: Any) -> Any:
        """Compiles the steps of `count` models; returns None if they exceed memory."""
        if count not in self._compiled:
            # Map over the `visual` column and all of the state but its step count.
            columns = dict.fromkeys(device_tables.device_columns(first.table))
            state_axes = State._make((None, 0, 0, 0, 0))
            static_axes = (None, {**columns, "visual": 0}, None, None)
            input_axes = {"sharded_tables": None, "index": 0}
            vectorized = jax.vmap(
                step.make_steps_fn(first),
                in_axes=(state_axes, static_axes, input_axes),
                out_axes=(state_axes, 0),
            )
            steps: Any = self._ctx.executor.compile(vectorized, donate=True)
            compiled = steps.lower(*args).compile()
            memory = compiled.memory_analysis()
            num_bytes = 0 if memory is None else memory.temp_size_in_bytes
            num_bytes += sum(x.nbytes for x in jax.tree.leaves(args[0]))
            has_space = executors.fits_on_devices(num_bytes)
            self._compiled[count] = compiled if has_space else None
        return self._compiled[count]


def _init_state(programs: list[Program], problems: list[Problem]) -> State:
    """Returns the state before the first step, each leaf stacked over the models."""
    init = jax.jit(step.make_init_fn(programs[0].optimizer, programs[0].group))
    states = [
        init(program.params, program.aux, problem.make_key("steps"))
        for program, problem in zip(programs, problems, strict=True)
    ]
    stacked = jax.tree.map(lambda *x: np.stack(jax.device_get(x)), *states)
    return stacked._replace(step=np.int32(0))
