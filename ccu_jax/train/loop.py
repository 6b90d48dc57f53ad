"""The one loop that runs a `Program`: steps, clocks, checkpoints.

Nothing is on the clock but `start` and the steps. Compiling, checkpointing and logging
have clocks of their own or none.
"""

import hashlib
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import threadpoolctl

from ccu_jax import errors
from ccu_jax.config.schema import Run
from ccu_jax.distributed import device_tables, preemption
from ccu_jax.distributed.executors import Executor
from ccu_jax.train import checkpoint, step
from ccu_jax.train.program import Program


class Outcome(NamedTuple):
    """What came of a program.

    `params`: the parts it trained; `seconds`: `start`, `steps` and `compile`; `steps`:
    updates made; `diverged`: None, or when and how it failed: then `params` are those
    of the last checkpoint before that, or those it began with.
    """

    params: Any
    seconds: dict[str, float]
    steps: int
    diverged: str | None


class Loop:
    """Runs programs, and keeps what it compiled for programs of the same shape.

    Args:
        config: how many steps a call, how often a checkpoint.
        executor: where.
        complain: told of every checkpoint that had to be passed over.
    """

    def __init__(  # noqa: D107  the class says it
        self, config: Run, executor: Executor, complain: Callable[[str], None]
    ):
        self._config, self._executor, self._complain = config, executor, complain
        self._compiled = {}

    def run(self, name, method, problem, folder: pathlib.Path, stage) -> Outcome:
        """Run a method to its end, from its last checkpoint if there is one.

        Args:
            name: of the method; with the settings of training, and with the shapes, it
                names the compiled steps.
            method: `Problem -> Program`.
            problem: what the method is given.
            folder: of its checkpoints.
            stage: told of the progress (`progress.Stage`).
        """
        # On CPUs XLA solves equations with BLAS, whose threads and XLA's wait for each
        # other: a solution of milliseconds takes now and then half a second.
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            return self._run(name, method, problem._replace(method=name), folder, stage)

    def _run(self, name, method, problem, folder, stage) -> Outcome:
        program, seconds = self._start(method, problem)
        if program.loss is None:
            return Outcome(
                program.params, seconds, 0, describe_nonfinite(program.params)
            )
        # What training is like is part of a program, what a method is like is data.
        kind = name, problem.config.train
        state = self._first_state(kind, program, problem.make_key("steps"), seconds)
        saved = checkpoint.restore(folder, state, self._complain)
        if saved is not None:
            state = self._executor.replicate(saved.tree)
            seconds = {**seconds, **saved.facts["seconds"]}
        resident = self._executor.replicate(step.static_inputs(program))
        compiled, took = self._compile(kind, program, state, resident)
        seconds["compile"] += took
        first = 0 if saved is None else saved.step
        with preemption.working():
            return self._steps(
                program, compiled, state, resident, first, seconds, folder, stage
            )

    def _start(self, method, problem):
        """Start twice: the first time compiles, the second is on the clock."""
        began = time.perf_counter()
        jax.block_until_ready(_arrays(method(problem)))
        warm = time.perf_counter() - began
        began = time.perf_counter()
        program = method(problem)
        jax.block_until_ready(_arrays(program))
        start = time.perf_counter() - began
        return program, {"start": start, "steps": 0.0, "compile": max(warm - start, 0)}

    def _first_state(self, kind, program, key, seconds):
        """Made by a program that is kept: it is the same for seeds and requests."""
        given = (program.params, program.aux, key)
        known = (kind, "start", _shapes(given))
        began = time.perf_counter()
        if known not in self._compiled:
            start = step.make_init(program.optimizer, program.group)
            self._compiled[known] = jax.jit(start)
        state = self._executor.replicate(self._compiled[known](*given))
        jax.block_until_ready(state)
        seconds["compile"] += time.perf_counter() - began
        return state

    def _per_call(self, program):
        # What works on features is so quick that it is asked for nothing in between.
        config = self._config
        most = (
            config.checkpoint_steps
            if program.is_fully_sharded
            else config.steps_per_call
        )
        # One of few sizes: a program for some steps more serves fewer as well.
        return min(most, 2 ** (program.steps - 1).bit_length())

    def _compile(self, kind, program, state, resident):
        share = step.step_inputs(program, self._executor, 0, self._per_call(program))
        given = (state, resident, share)
        key = (kind, _shapes(given))
        if key in self._compiled:
            return self._compiled[key], 0.0
        began = time.perf_counter()
        steps = self._executor.compile(step.make_steps(program), donate=True)
        lowered = steps.lower(*given)
        # Several methods may come to the same program: all that train from scratch do.
        text = hashlib.sha256(lowered.as_text().encode()).digest()
        if text not in self._compiled:
            self._compiled[text] = lowered.compile()
        self._compiled[key] = self._compiled[text]
        return self._compiled[key], time.perf_counter() - began

    def _steps(
        self, program, compiled, state, resident, first, seconds, folder, stage
    ) -> Outcome:
        size, total = self._per_call(program), program.steps
        every = self._config.checkpoint_steps
        stage.update(first, total)
        before = None  # the metrics of the call before: read while this one computes
        diverged, ended = None, None
        began = time.perf_counter()
        for start in range(first, total, size):
            share = step.step_inputs(program, self._executor, start, size)
            # Whatever would be copied unasked, between host and devices, is refused.
            # Around it, numbers of rows are handed over and metrics fetched by name.
            with jax.transfer_guard("disallow"):
                state, metrics = compiled(state, resident, share)
            if before is not None:
                diverged, ended = check_metrics(before, start - size, stage)
                if diverged or ended is not None:
                    break
            before = metrics
            done = min(start + size, total)
            if done == total:  # all may be one call: who is told meanwhile is heard
                jax.block_until_ready(state)
            # After the last step, too: what follows is long.
            leaving = preemption.due(last=done == total)
            if leaving or done < total and done // every > start // every:
                jax.block_until_ready(state)
                seconds["steps"] += time.perf_counter() - began
                # Nothing that has failed is gone on from.
                diverged, ended = check_metrics(before, start, stage)
                if not diverged and (broken := describe_nonfinite(state.params)):
                    diverged, ended = f"step {done - 1}: {broken}", done
                if not diverged:
                    facts = {"seconds": {k: seconds[k] for k in ("start", "steps")}}
                    checkpoint.save(folder, done, state, facts)
                if leaving:
                    raise errors.Preempted
                before = None
                began = time.perf_counter()
                if diverged or ended is not None:
                    break
        if before is not None and not (diverged or ended is not None):
            diverged, ended = check_metrics(before, start, stage)
        if diverged:
            state, kept = self._last_good(program, state, folder)
            diverged = f"{diverged}; what it was at step {kept} is kept"
        params = state.params
        if program.result is not None:
            params = program.result(params, state.aux)
        jax.block_until_ready((state, params))
        seconds["steps"] += time.perf_counter() - began
        # Asked of the state: a call that was stopped early did not make all its steps.
        made = ended if diverged else int(state.step)
        stage.update(made)
        return Outcome(params, seconds, made, diverged or describe_nonfinite(params))

    def _last_good(self, program, state, folder):
        """The last checkpoint, or the beginning, and which step that is."""
        saved = checkpoint.restore(folder, state, self._complain)
        if saved is not None:
            return self._executor.replicate(saved.tree), saved.step
        return state._replace(params=program.params, aux=program.aux), 0


def describe_nonfinite(params):
    """None, or what is wrong with parameters that are no numbers any more."""
    for part, tree in sorted(params.items()):
        if not all(np.isfinite(x).all() for x in jax.device_get(jax.tree.leaves(tree))):
            return f"parameters of {part} are not finite"
    return None


def check_metrics(metrics, start, stage):
    """Read a call's metrics: whether it failed, and where it stopped itself."""
    metrics = jax.device_get(metrics)
    ran = metrics["ran"]
    if not ran.all():
        ended = start + int(ran.sum())
    else:
        ended = None
    bad = ran & ~(np.isfinite(metrics["loss"]) & np.isfinite(metrics["gradient"]))
    if bad.any():
        failed = start + int(bad.argmax())
        what = "loss" if not np.isfinite(metrics["loss"][bad.argmax()]) else "gradient"
        return f"step {failed}: {what} {metrics[what][bad.argmax()]}", failed
    if ran.any():
        last = int(np.flatnonzero(ran)[-1])
        stage.update(start + last + 1, loss=float(metrics["loss"][last]))
    return None, ended


def _shapes(tree):
    return repr(jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree))


def _arrays(program: Program):
    table = device_tables.device_columns(program.table)
    rest = (
        program.frozen,
        program.sharded_tables,
        program.aux,
        program.optimizer_inputs,
    )
    return (program.params, table, *rest)
