"""Runs a `Program` to its end: steps, clocks, checkpoints.

The method's preparation, its steps, and compilation are timed separately; checkpoints
and logging are not timed.
"""

import hashlib
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import threadpoolctl

from ccu_jax.config.schema import Config, Run
from ccu_jax.distributed import preemption
from ccu_jax.distributed.device_tables import device_columns
from ccu_jax.distributed.executors import Executor
from ccu_jax.errors import Preempted
from ccu_jax.models import Params
from ccu_jax.train import checkpoint
from ccu_jax.train.program import Program, State
from ccu_jax.train.step import make_init, make_steps, static_inputs, step_inputs


class _Problem(Protocol):
    """The part of `methods.Problem`, a type of a layer above, that the loop reads."""

    @property
    def config(self) -> Config: ...
    @property
    def _replace(self) -> Callable[..., Any]: ...
    def make_key(self, purpose: str) -> jax.Array: ...


class _Stage(Protocol):
    """The part of the progress display that the loop updates."""

    def update(self, done: int, total: int | None = None, **metrics: Any) -> None: ...


class Outcome(NamedTuple):
    """The result of a program.

    Attributes:
        params: the trained modules.
        seconds: wall time by clock: `start`, `steps` and `compile`.
        steps: number of updates made.
        diverged: None, or at which step and how training failed. `params` are then
            those of the last checkpoint, or the initial ones if there is none.
    """

    params: Params
    seconds: dict[str, float]
    steps: int
    diverged: str | None


class Loop:
    """Runs programs and caches compiled steps for programs of the same shapes.

    `on_warning` is called with a message for every checkpoint that is unusable.
    """

    def __init__(  # noqa: D107  see the class
        self, config: Run, executor: Executor, on_warning: Callable[[str], None]
    ):
        self.config, self.executor, self.on_warning = config, executor, on_warning
        self._compiled: dict[Any, Any] = {}

    def run(
        self,
        name: str,
        method: Callable[[Any], Program],
        problem: _Problem,
        folder: pathlib.Path,
        stage: _Stage,
    ) -> Outcome:
        """Runs a method to its end, from its last checkpoint if `folder` has one.

        Name of the method, training section and shapes identify the compiled steps.

        Raises:
            Preempted: after a checkpoint was saved for a SIGTERM.
        """
        # XLA's linear solvers call BLAS on CPUs, and the threads of both would wait for
        # each other: a solution of milliseconds then sometimes takes half a second.
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            problem = problem._replace(method=name)
            program, seconds = _start(method, problem)
            if program.loss is None:
                diverged = _describe_nonfinite(program.params)
                return Outcome(program.params, seconds, 0, diverged)
            execution = _Execution(self, program, seconds, folder, stage)
            # The training section is compiled into the steps; hyperparameters are data.
            execution.prepare((name, problem.config.train), problem.make_key("steps"))
            with preemption.defer_exit():
                execution.run_steps()
                return execution.finish()

    def steps_per_call(self, program: Program) -> int:
        """Returns the number of steps of a call.

        A power of two, so that programs of similar lengths share an executable.
        """
        config = self.config
        # Steps on stored features are fast: one call may last until a checkpoint.
        is_fast = program.is_fully_sharded
        max_steps = config.checkpoint_steps if is_fast else config.steps_per_call
        return min(max_steps, 2 ** (program.steps - 1).bit_length())

    def compile_init(self, kind: Any, program: Program, args: tuple) -> Callable:
        """Returns the function that makes the first state from `args`."""
        init = jax.jit(make_init(program.optimizer, program.group))
        return self._compiled.setdefault((kind, "init", _structure(args)), init)

    def compile_steps(self, kind: Any, program: Program, args: tuple) -> Callable:
        """Returns the compiled steps of a program for arguments of these shapes."""
        cache_key = (kind, "steps", _structure(args))
        if cache_key not in self._compiled:
            steps = self.executor.compile(make_steps(program), donate=True)
            lowered = steps.lower(*args)
            # Methods with the same HLO, like all that train anew, share an executable.
            digest = hashlib.sha256(lowered.as_text().encode()).digest()
            if digest not in self._compiled:
                self._compiled[digest] = lowered.compile()
            self._compiled[cache_key] = self._compiled[digest]
        return self._compiled[cache_key]


class _Execution:
    """Runs the steps of one program, `size` in a call, from step `first` on."""

    def __init__(self, loop, program, seconds, folder, stage):
        self._loop, self._program, self._seconds = loop, program, seconds
        self._folder, self._stage = folder, stage
        self._failure: str | None = None  # how a step failed
        self._end: int | None = None  # steps made, after a failure or a stop

    def prepare(self, kind: Any, key: jax.Array) -> None:
        """Restores the last checkpoint and compiles the steps."""
        loop, program, seconds = self._loop, self._program, self._seconds
        start_s = time.perf_counter()
        args = program.params, program.aux, key
        state = loop.executor.replicate(loop.compile_init(kind, program, args)(*args))
        jax.block_until_ready(state)
        seconds["compile"] += time.perf_counter() - start_s
        self._state, self._first, stored_seconds = self._restore(state)
        seconds |= stored_seconds
        self._static = loop.executor.replicate(static_inputs(program))
        self._size = loop.steps_per_call(program)
        inputs = step_inputs(program, loop.executor, 0, self._size)
        start_s = time.perf_counter()
        args = self._state, self._static, inputs
        self._compiled = loop.compile_steps(kind, program, args)
        seconds["compile"] += time.perf_counter() - start_s

    def _restore(self, initial: State) -> tuple[State, int, dict[str, float]]:
        """Returns the last checkpoint, its step and clocks; else the initial state."""
        saved = checkpoint.restore(self._folder, initial, self._loop.on_warning)
        if saved is None:
            return initial, 0, {}
        state = self._loop.executor.replicate(saved.tree)
        return state, saved.step, saved.metadata["seconds"]

    def run_steps(self) -> None:
        """Makes all steps that are left, with checkpoints in between."""
        total, every = self._program.steps, self._loop.config.checkpoint_steps
        self._stage.update(self._first, total)
        self._resumed_s = time.perf_counter()
        pending = None  # metrics of the last call, read while the next one computes
        for start in range(self._first, total, self._size):
            inputs = step_inputs(self._program, self._loop.executor, start, self._size)
            # Row numbers are sent and metrics fetched explicitly; any other copy
            # between host and devices is a mistake.
            with jax.transfer_guard("disallow"):
                self._state, metrics = self._compiled(self._state, self._static, inputs)
            if pending is not None and self._read_metrics(*pending):
                return
            pending = metrics, start
            done = min(start + self._size, total)
            if done == total:  # a SIGTERM during the last call is noticed as well
                jax.block_until_ready(self._state)
            should_stop = preemption.should_stop()
            if should_stop or (done < total and done // every > start // every):
                self._save(metrics, start, done)
                if should_stop:
                    raise Preempted
                if self._end is not None:
                    return
                pending = None
        if pending is not None:
            self._read_metrics(*pending)

    def _read_metrics(self, metrics: dict[str, jax.Array], start: int) -> bool:
        """Reads the metrics of a call from step `start` on and reports the last loss.

        Returns whether a step failed or the program stopped itself.
        """
        loss, gradient, ran = jax.device_get(
            [metrics[name] for name in ("loss", "gradient", "ran")]
        )
        failed = ran & ~(np.isfinite(loss) & np.isfinite(gradient))
        if failed.any():
            first = int(failed.argmax())
            is_loss = not np.isfinite(loss[first])
            reason = f"loss {loss[first]}" if is_loss else f"gradient {gradient[first]}"
            self._end = start + first
            self._failure = f"step {self._end}: {reason}"
            return True
        if ran.any():
            last = int(np.flatnonzero(ran)[-1])
            self._stage.update(start + last + 1, loss=float(loss[last]))
        self._end = None if ran.all() else start + int(ran.sum())
        return self._end is not None

    def _save(self, metrics, start, done) -> None:
        """Saves a checkpoint, unless one of the steps has failed."""
        jax.block_until_ready(self._state)
        self._seconds["steps"] += time.perf_counter() - self._resumed_s
        self._read_metrics(metrics, start)
        if not self._failure and (reason := _describe_nonfinite(self._state.params)):
            self._failure, self._end = f"step {done - 1}: {reason}", done
        if not self._failure:
            seconds = {clock: self._seconds[clock] for clock in ("start", "steps")}
            checkpoint.save(self._folder, done, self._state, {"seconds": seconds})
        self._resumed_s = time.perf_counter()

    def finish(self) -> Outcome:
        """Returns the result, after a failure that of the last checkpoint."""
        program, state, failure = self._program, self._state, self._failure
        if failure:
            initial = state._replace(params=program.params, aux=program.aux)
            state, step, _ = self._restore(initial)
            failure = f"{failure}; parameters of step {step} restored"
        params = state.params
        if program.result is not None:
            params = program.result(params, state.aux)
        jax.block_until_ready((state, params))
        self._seconds["steps"] += time.perf_counter() - self._resumed_s
        # With early stopping the last call runs fewer steps: the state counts them.
        steps = int(state.step)
        if failure and self._end is not None:
            steps = self._end
        self._stage.update(steps)
        diverged = failure or _describe_nonfinite(params)
        return Outcome(params, self._seconds, steps, diverged)


def _start(method, problem) -> tuple[Program, dict[str, float]]:
    """Runs the method's preparation twice: the first compiles, the second is timed."""
    first_s = _prepare_program(method, problem)[1]
    program, start_s = _prepare_program(method, problem)
    seconds = {"start": start_s, "steps": 0.0, "compile": max(first_s - start_s, 0)}
    return program, seconds


def _prepare_program(method, problem) -> tuple[Program, float]:
    start_s = time.perf_counter()
    program = method(problem)
    tables = device_columns(program.table), program.sharded_tables
    inputs = program.frozen, program.aux, program.optimizer_inputs
    jax.block_until_ready((program.params, tables, inputs))
    return program, time.perf_counter() - start_s


def _describe_nonfinite(params: Params) -> str | None:
    """Returns which module has parameters that are not finite, or None."""
    for module, tree in sorted(params.items()):
        if not all(np.isfinite(x).all() for x in jax.device_get(jax.tree.leaves(tree))):
            return f"parameters of {module} are not finite"
    return None


def _structure(tree: Any) -> tuple:
    """Returns structure, shapes and types of a tree, to identify an executable."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, str(x.dtype)) for x in leaves)
