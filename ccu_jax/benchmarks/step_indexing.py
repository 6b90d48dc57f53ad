"""The loop that the compiled one is compared with: arrays indexed in Python."""

import time

import jax
import jax.numpy as jnp

from ccu_jax.distributed.executors import vmap
from ccu_jax.train import step
from ccu_jax.train.program import State

# What the losses of methods on parts read; who indexes in Python takes no more.
_EVERY = ("features", "image", "h_text", "has_image", "has_text", "labels")
_KEPT = ("original_image", "original_fused")
_READ = {
    "unlearn": (*_EVERY, "z_text", "row"),
    "retain": (*_EVERY, "z_text", *_KEPT),
    "held": (*_EVERY, *_KEPT),
}


class Indexing:
    """The loop that most people write: each column indexed in Python, then a step.

    On one device, where `x[rows]` is what it is. The step is the same, but gets the
    batch instead of numbers of rows; refreshes are calls of their own.

    Args:
        steps: `bench_step_ways.Steps`.
    """

    def __init__(self, steps):  # noqa: D107
        program, self._steps = steps.program, steps
        one = vmap(1)
        bare = program._replace(sharded_tables={}, table={}, refresh=None)
        inner = one.compile(step.make_steps(bare))

        def made(state, resident, batch):
            index = jax.tree.map(lambda x: x[None, None], batch)
            return inner(state, resident, {"sharded_tables": {}, "index": index})

        def refresh(said, frozen, parts):
            params, aux = said
            return program.refresh(params, frozen, aux, parts), ()

        self._made = jax.jit(made, donate_argnums=0)
        self._refresh = program.refresh and one.compile(refresh)
        frozen, _, counts, numbers = step.static_inputs(program)
        self._resident = frozen, {}, counts, numbers
        self._tables = {
            name: {
                k: x[0]
                for k, x in program.sharded_tables[name].items()
                if k in _READ[name]
            }
            if name in program.sharded_tables
            else program.table
            for name in program.plan
        }

    def run(self) -> tuple[float, State]:
        """Seconds of a step, and the last state."""
        steps, program = self._steps, self._steps.program
        state = steps.fresh()
        began = time.perf_counter()
        for number in range(steps.steps):
            if self._refresh and number % program.refresh_every == 0:
                said = state.params, state.aux
                aux, _ = self._refresh(said, program.frozen, program.sharded_tables)
                state = state._replace(aux=aux)
            batch = {}
            for name, plan in program.plan.items():
                rows = jnp.asarray(plan[number])
                batch[name] = {k: x[rows] for k, x in self._tables[name].items()}
                batch[name]["rows"] = rows
            state, _ = self._made(state, self._resident, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / steps.steps, state
