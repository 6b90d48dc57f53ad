"""The training state and the one update that every method shares.

A method is data: a `Program`. Several updates run as one compiled loop, so that the
host is asked for nothing between them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from ccu_jax.data.batches import HostColumn
from ccu_jax.distributed.executors import AXIS, Executor


class Program(NamedTuple):
    """What a method wants to be run.

    Attributes:
        params: the parts of the classifier that it trains.
        frozen: the other parts, used and never changed.
        loss: `loss(params, frozen, aux, batch, step) -> (scalar, metrics)`, or None
            where `params` are already the result. `batch` maps each name of `plan` to
            rows of `table` with a random key per row (`key`); scalars are means over
            all devices.
        optimizer: an optax transformation. What it is given are not the parts but long
            vectors, one for each `group`: far less to compile and to run.
        numbers: given to the optimizer at each update, as `numbers`: rates and masks
            as data, so that others need no other program.
        group: the name of a part to the name of its group.
        table: arrays with a leading row axis, by name, on the devices; an `HostColumn`
            stays where it is, and only the rows of the steps to come are sent.
        parts: tables of their own for parts of a batch, their rows cut over the devices
            (`Executor.cut`): no device holds more than its share of them.
        plan: for each part of a batch, which rows of its table: int32 `[steps, batch]`.
        aux: what the method carries along besides parameters (targets ...).
        refresh: `refresh(params, frozen, aux, parts) -> aux`, run before every
            `refresh_every`-th step, the first included, with this device's rows.
        refresh_every: steps between refreshes.
        stop: `stop(aux) -> bool`: no further step once it is true.
        result: `result(params, aux) -> params`: what the method gives in the end, where
            that is not what the last step has left.
    """

    params: Any
    frozen: Any
    loss: Callable | None
    optimizer: optax.GradientTransformation | None = None
    optimizer_inputs: Any = ()
    group: Callable[[str], str] = lambda part: "all"
    table: dict[str, Any] = {}  # noqa: RUF012  never changed
    sharded_tables: dict[str, Any] = {}  # noqa: RUF012  never changed
    plan: dict[str, Any] | None = None
    aux: Any = ()
    refresh: Callable | None = None
    refresh_every: int = 1
    stop: Callable | None = None
    result: Callable | None = None

    @property
    def steps(self) -> int:
        """Number of updates."""
        return 0 if self.plan is None else len(next(iter(self.plan.values())))

    @property
    def in_parts(self) -> bool:
        """Whether all its rows lie in parts of its own, as of methods on features."""
        return self.plan is not None and set(self.plan) <= set(self.sharded_tables)


class State(NamedTuple):
    """All that changes from step to step: the same on every device."""

    step: jax.Array
    params: Any
    opt: Any
    aux: Any
    key: jax.Array


def init_state(program: Program, key: jax.Array) -> State:
    """The state before the first step.

    Its arrays are copies: the state is donated to each step, and what the program holds
    may be used elsewhere.
    """

    given = program.params, program.aux, key
    return jax.jit(make_init(program.optimizer, program.group))(*given)


def make_init(optimizer, group: Callable[[str], str]) -> Callable:
    """`fn(params, aux, key)` gives the state before the first step, to be compiled.

    As one program: many small ones, each for a shape, take longer to compile.
    """

    def start(params, aux, key):
        params, aux = jax.tree.map(jnp.copy, (params, aux))
        return State(
            step=jnp.int32(0),
            params=params,
            opt=optimizer.init(flatten(group, params)[0]),
            aux=aux,
            key=jax.random.key_data(key),
        )

    return start


def flatten(group: Callable[[str], str], params):
    """The parameters as one vector for each group, and the way back."""
    names = {}
    for part in params:
        names.setdefault(group(part), []).append(part)
    flat, back = {}, {}
    for group, parts in names.items():
        flat[group], back[group] = jax.flatten_util.ravel_pytree(
            {part: params[part] for part in parts}
        )

    def tree(flat):
        return {k: x for group in back for k, x in back[group](flat[group]).items()}

    return flat, tree


def static_inputs(program: Program) -> tuple:
    """What the steps need besides state and rows: it stays on the devices."""
    # Counts are data as well: a program of more steps, or fewer looks, is no other one.
    counts = jnp.int32(program.steps), jnp.int32(program.refresh_every)
    optimizer_inputs = jax.tree.map(jnp.asarray, program.optimizer_inputs)
    return program.frozen, on_devices(program.table), counts, optimizer_inputs


def on_devices(table):
    """The part of a table that is on the devices."""
    return {k: v for k, v in table.items() if not isinstance(v, HostColumn)}


def send_rows(executor: Executor, table, index, axis: int = 0):
    """Row numbers `index` cut over the devices along `axis`, and what they need.

    Returns:
        `rows`, and for each column on the host the rows themselves, by its name.
    """
    mine = executor.local_shard(index, axis)
    sent = {k: v.take(mine) for k, v in table.items() if isinstance(v, HostColumn)}
    return {name: executor.to_global(x) for name, x in ({"rows": mine} | sent).items()}


def gather(table, index):
    """The rows of a table on a device; `index` is one device's share of `rows_of`."""
    sent = {name: x for name, x in index.items() if name != "rows"}
    return jax.tree.map(lambda x: x[index["rows"]], table) | sent


def gather_replicated(tree):
    """All devices' rows on every device, as a sum: exact, for each adds only zeros.

    Unlike what is gathered, a sum is known to be the same everywhere.
    """

    def spread(x):
        size = jax.lax.axis_size(AXIS)
        # A truth is a number here: they are what can be added up.
        number = x.astype(jnp.int8) if x.dtype == bool else x
        wide = jnp.zeros((size, *x.shape), number.dtype)
        wide = wide.at[jax.lax.axis_index(AXIS)].set(number)
        wide = jax.lax.psum(wide, AXIS).astype(x.dtype)
        return wide.reshape((-1, *x.shape[1:]))

    return jax.tree.map(spread, tree)


def take_sharded(part, index):
    """Rows of a table that is cut over the devices.

    Args:
        part: columns `[L, ...]`, this device's rows: numbers `L * device` and so on.
        index: `[B]`, the rows that this device wants, of all.
    """
    if jax.lax.axis_size(AXIS) == 1:
        return jax.tree.map(lambda x: x[index], part)
    wanted = jax.lax.all_gather(index, AXIS, tiled=True)

    def one(x):
        place = wanted - jax.lax.axis_index(AXIS) * len(x)
        here = (place >= 0) & (place < len(x))
        found = x[jnp.clip(place, 0, len(x) - 1)]
        found = jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), found, 0)
        # Each row lies on one device: the others add zeros, so the sum is exact.
        if x.dtype == bool:
            found = found.astype(jnp.int8)
        mine = jax.lax.psum_scatter(found, AXIS, scatter_dimension=0, tiled=True)
        return mine.astype(x.dtype)

    return jax.tree.map(one, part)


def make_steps(program: Program) -> Callable:
    """The per-device function of `parallel.Executor.run`: several updates in a loop.

    `fn(state, resident, share) -> (state, metrics)` with what `resident` gives;
    `share` holds the `parts` and as `index` what `rows_of` gives for `[steps, rows]`
    per part of the batch. Steps past the end of the program are not made (`ran` is
    false in their metrics): the last call is as long as the others.
    """

    def fn(state, resident, share):
        frozen, table, (total, every), optimizer_inputs = resident
        parts, indices = share["sharded_tables"], share["index"]
        size = len(next(iter(indices.values()))["rows"])
        flat, tree = flatten(program.group, state.params)
        optimizer = optax.with_extra_args_support(program.optimizer)

        def objective(params, aux, batch, step):
            loss, metrics = program.loss(params, frozen, aux, batch, step)
            # The mean inside the gradient and the mean of the gradients after it: right
            # under pmap, shard_map and vmap alike.
            return jax.lax.pmean(loss, AXIS), metrics

        def rows(part, index):
            if part in parts:
                return take_sharded(parts[part], index["rows"])
            return gather(table, index)

        def update(state, index):
            batch = {
                part: rows(part, i) | {"key": _row_keys(state, part, len(i["rows"]))}
                for part, i in index.items()
            }
            (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(
                tree(state.params), state.aux, batch, state.step
            )
            # One collective for each group, not one for each array.
            grads = jax.lax.pmean(flatten(program.group, grads)[0], AXIS)
            updates, opt = optimizer.update(
                grads, state.opt, state.params, inputs=optimizer_inputs
            )
            params = optax.apply_updates(state.params, updates)
            metrics = metrics | {"loss": loss, "gradient": optax.tree.norm(grads)}
            return State(state.step + 1, params, opt, state.aux, state.key), metrics

        def refreshed(state):
            if program.refresh is None:
                return state
            aux = jax.lax.cond(
                state.step % every == 0,
                lambda: program.refresh(tree(state.params), frozen, state.aux, parts),
                lambda: state.aux,
            )
            return state._replace(aux=aux)

        def going(place, state):
            more = (place < size) & (state.step < total)
            return more if program.stop is None else more & ~program.stop(state.aux)

        def one(carry):
            place, state, told = carry
            state, metrics = made(state, jax.tree.map(lambda x: x[place], indices))
            told = {name: x.at[place].set(metrics[name]) for name, x in told.items()}
            return place + 1, state, told

        def period(carry):
            """The steps up to the next refresh."""
            place, state, told = carry
            state, end = refreshed(state), size
            if program.refresh is not None:
                end = place + every - state.step % every
            return jax.lax.while_loop(
                lambda carry: (carry[0] < end) & going(*carry[:2]),
                one,
                (place, state, told),
            )

        # Loops that end by themselves, not a scan whose last steps are passed over: a
        # branch around each step would copy the state, and be compiled as well.
        first, made = state._replace(params=flat), jax.jit(update)  # traced once
        shapes = jax.eval_shape(made, first, jax.tree.map(lambda x: x[0], indices))
        told = {n: jnp.zeros((size, *x.shape), x.dtype) for n, x in shapes[1].items()}
        carry = (jnp.int32(0), first, told)
        count, state, told = jax.lax.while_loop(
            lambda carry: going(*carry[:2]), period, carry
        )
        told["ran"] = jnp.arange(size) < count
        return state._replace(params=tree(state.params)), told

    return fn


def _row_keys(state, part, rows):
    """One key per row: of the step, the part and its place in the global batch."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    # A stable number for the part's name; Python's own hash differs between processes.
    key = jax.random.fold_in(key, sum(part.encode()))
    place = jax.lax.axis_index(AXIS) * rows + jnp.arange(rows)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, place)
