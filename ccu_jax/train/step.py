"""The training steps of all methods: several updates in one compiled loop.

The host is not involved between the steps of a call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax.distributed import device_tables
from ccu_jax.distributed.executors import AXIS, Executor
from ccu_jax.train.program import Program, State


def init_state(program: Program, key: jax.Array) -> State:
    """Returns the state before the first step.

    Its arrays are copies, because each call of the steps donates its input state.
    """
    init = jax.jit(make_init_fn(program.optimizer, program.group))
    return init(program.params, program.aux, key)


def make_init_fn(
    optimizer: optax.GradientTransformation, group: Callable[[str], str]
) -> Callable[..., State]:
    """Returns `init(params, aux, key) -> State`, a function to jit."""

    def init(params, aux, key):
        params, aux = jax.tree.map(jnp.copy, (params, aux))
        return State(
            step=jnp.int32(0),
            params=params,
            opt=optimizer.init(flatten(group, params)[0]),
            aux=aux,
            key=jax.random.key_data(key),
        )

    return init


def flatten(
    group: Callable[[str], str], params: dict[str, Any]
) -> tuple[dict[str, jax.Array], Callable[[dict[str, jax.Array]], dict[str, Any]]]:
    """Flattens parameters to one vector per group; also returns the inverse."""
    groups = {}
    for module, tree in params.items():
        groups.setdefault(group(module), {})[module] = tree
    vectors, inverses = {}, {}
    for name, modules in groups.items():
        vectors[name], inverses[name] = jax.flatten_util.ravel_pytree(modules)

    def unflatten(vectors):
        trees = [inverse(vectors[name]) for name, inverse in inverses.items()]
        return {module: x for tree in trees for module, x in tree.items()}

    return vectors, unflatten


def static_inputs(program: Program) -> tuple:
    """Returns the inputs that are the same in all steps and stay on the devices."""
    # Step counts are traced, so runs of different lengths share one executable.
    counts = jnp.int32(program.steps), jnp.int32(program.refresh_every)
    optimizer_inputs = jax.tree.map(jnp.asarray, program.optimizer_inputs)
    columns = device_tables.device_columns(program.table)
    return program.frozen, columns, counts, optimizer_inputs


def send_batches(
    program: Program, executor: Executor, start: int, size: int
) -> dict[str, Any]:
    """Sends row numbers of steps `start` to `start + size` to the devices, padded."""

    def send(part, plan):
        rows = plan[start : start + size]
        rows = np.pad(rows, ((0, size - len(rows)), (0, 0)))
        table = {} if part in program.sharded_tables else program.table
        return device_tables.send_rows(executor, table, rows, axis=1)

    index = {part: send(part, plan) for part, plan in program.plan.items()}
    return {"sharded_tables": program.sharded_tables, "index": index}


def make_steps_fn(program: Program) -> Callable:
    """Returns a per-device function that runs several training steps.

    Pass it to `Executor.compile`: `fn(state, static_inputs, step_inputs) -> (state,
    metrics)`. Metrics have one entry per step. Steps after the end of the program
    do not run (their `ran` is False), so that all calls have the same size.
    """

    def fn(state, static, inputs):
        vectors, unflatten = flatten(program.group, state.params)
        loop = _StepLoop(program, unflatten, *static, **inputs)
        state, metrics = loop.run(state._replace(params=vectors))
        return state._replace(params=unflatten(state.params)), metrics

    return fn


class _StepLoop(NamedTuple):
    """The inputs of one call of the compiled steps, as traced arrays."""

    program: Program
    unflatten: Callable
    frozen: Any
    columns: dict[str, jax.Array]
    counts: tuple[jax.Array, jax.Array]
    optimizer_inputs: Any
    sharded_tables: dict[str, Any]
    index: dict[str, Any]

    def run(self, state: State) -> tuple[State, dict[str, jax.Array]]:
        """Runs the steps; returns the state and the metrics by step."""
        size, (total, every) = len(next(iter(self.index.values()))["rows"]), self.counts
        update = jax.jit(self._update)  # traced once
        index = jax.tree.map(lambda x: x[0], self.index)
        _, shapes = jax.eval_shape(update, state, index)
        metrics = {n: jnp.zeros((size, *x.shape), x.dtype) for n, x in shapes.items()}

        def should_continue(position, state):
            is_left = (position < size) & (state.step < total)
            stop = self.program.stop
            return is_left if stop is None else is_left & ~stop(state.aux)

        def one_step(carry):
            position, state, metrics = carry
            state, new = update(state, jax.tree.map(lambda x: x[position], self.index))
            metrics = {n: x.at[position].set(new[n]) for n, x in metrics.items()}
            return position + 1, state, metrics

        def until_next_refresh(carry):
            position, state, metrics = carry
            state, end = self._refresh(state), size
            if self.program.refresh is not None:
                end = position + every - state.step % every
            return jax.lax.while_loop(
                lambda carry: (carry[0] < end) & should_continue(*carry[:2]),
                one_step,
                (position, state, metrics),
            )

        # While loops instead of a scan with skipped steps: a branch around each step
        # would copy the state and compile twice.
        count, state, metrics = jax.lax.while_loop(
            lambda carry: should_continue(*carry[:2]),
            until_next_refresh,
            (jnp.int32(0), state, metrics),
        )
        metrics["ran"] = jnp.arange(size) < count
        return state, metrics

    def _update(self, state, index):
        """Runs one training step; returns the new state and the metrics."""
        program = self.program
        loss_fn: Any = program.loss
        batch = {
            part: self._gather_batch(part, i)
            | {"key": _row_keys(state, part, len(i["rows"]))}
            for part, i in index.items()
        }

        def objective(params, aux, batch, step):
            loss, metrics = loss_fn(params, self.frozen, aux, batch, step)
            # With both pmeans, this one and that of the gradients, the result is
            # correct under pmap, shard_map and vmap.
            return jax.lax.pmean(loss, AXIS), metrics

        (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(
            self.unflatten(state.params), state.aux, batch, state.step
        )
        # One collective per group, not one per array.
        grads = jax.lax.pmean(flatten(program.group, grads)[0], AXIS)
        updates, opt = optax.with_extra_args_support(program.optimizer).update(
            grads, state.opt, state.params, inputs=self.optimizer_inputs
        )
        params: Any = optax.apply_updates(state.params, updates)
        metrics = metrics | {"loss": loss, "gradient": optax.tree.norm(grads)}
        return State(state.step + 1, params, opt, state.aux, state.key), metrics

    def _gather_batch(self, part, index):
        if part in self.sharded_tables:
            table = self.sharded_tables[part]
            return device_tables.gather_sharded(table, index["rows"])
        return device_tables.gather_rows(self.columns, index)

    def _refresh(self, state):
        """Runs the program's refresh if it is due at this step."""
        refresh = self.program.refresh
        if refresh is None:
            return state

        def refreshed():
            params = self.unflatten(state.params)
            return refresh(params, self.frozen, state.aux, self.sharded_tables)

        is_due = state.step % self.counts[1] == 0
        return state._replace(aux=jax.lax.cond(is_due, refreshed, lambda: state.aux))


def _row_keys(state, part, num_rows):
    """Returns a key per row, derived from the step, the part and the row's position."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    # Python's own hash of a string differs between processes.
    key = jax.random.fold_in(key, sum(part.encode()))
    position = jax.lax.axis_index(AXIS) * num_rows + jnp.arange(num_rows)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, position)
