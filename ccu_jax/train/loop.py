"""The training loop: runs the steps of a `Program` and saves checkpoints.

The preparation of the program, its steps, and compilation are timed separately;
checkpoints and logging are not timed.
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
from ccu_jax.train.step import make_init_fn, make_steps_fn, send_batches, static_inputs


class _Problem(Protocol):
    """The attributes of `methods.Problem` (in a higher layer) that `Loop` uses."""

    @property
    def config(self) -> Config: ...
    @property
    def _replace(self) -> Callable[..., Any]: ...
    def make_key(self, purpose: str) -> jax.Array: ...


class _Stage(Protocol):
    """The one method of the progress display that `Loop` calls."""

    def update(self, done: int, total: int | None = None, **metrics: Any) -> None: ...


class Outcome(NamedTuple):
    """The result of running a program.

    Attributes:
        params: the trained modules.
        seconds: wall times `start` (preparation), `steps` and `compile`.
        steps: number of completed training steps.
        diverged: the step and the reason if training failed, else None. After a
            failure, `params` are those of the last checkpoint, or the initial ones.
    """

    params: Params
    seconds: dict[str, float]
    steps: int
    diverged: str | None


class Loop:
    """Runs programs; programs with the same shapes share compiled steps.

    `on_warning` is called with a message for each checkpoint that cannot be restored.
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
        """Runs a method to completion, resuming from the last checkpoint in `folder`.

        Compiled steps are cached by method name, training configuration and shapes.
        Raises Preempted after a SIGTERM, once a checkpoint has been saved.
        """
        # XLA's linear solvers call BLAS on CPUs, and their threads contend: a solve
        # that needs milliseconds sometimes takes half a second.
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            problem = problem._replace(method=name)
            program, seconds = _prepare_timed(method, problem)
            if program.loss is None:
                diverged = _describe_nonfinite(program.params)
                return Outcome(program.params, seconds, 0, diverged)
            execution = _Execution(self, program, seconds, folder, stage)
            # The training configuration is static; hyperparameters are traced.
            execution.prepare((name, problem.config.train), problem.make_key("steps"))
            with preemption.defer_exit():
                execution.run_steps()
                return execution.finish()

    def steps_per_call(self, program: Program) -> int:
        """Returns the number of steps that one call of the executable runs."""
        max_steps = self.config.steps_per_call
        if program.is_fully_sharded:
            # Steps on cached features are fast, so a call may last until a checkpoint.
            max_steps = self.config.checkpoint_steps
        # Short programs round up to a power of two, so that they share executables.
        return min(max_steps, 2 ** (program.steps - 1).bit_length())

    def jit_init(self, kind: Any, program: Program, args: tuple) -> Callable:
        """Returns the jitted function that builds the initial state from `args`."""
        init = jax.jit(make_init_fn(program.optimizer, program.group))
        return self._compiled.setdefault((kind, "init", _shape_key(args)), init)

    def compile_steps(self, kind: Any, program: Program, args: tuple) -> Callable:
        """Returns the executable of a program's steps, compiled unless it is cached."""
        cache_key = (kind, "steps", _shape_key(args))
        if cache_key not in self._compiled:
            steps = self.executor.compile(make_steps_fn(program), donate=True)
            lowered = steps.lower(*args)
            # Methods with the same HLO, such as all references, share an executable.
            digest = hashlib.sha256(lowered.as_text().encode()).digest()
            if digest not in self._compiled:
                self._compiled[digest] = lowered.compile()
            self._compiled[cache_key] = self._compiled[digest]
        return self._compiled[cache_key]


class _Execution:
    """One run of a program, from the last checkpoint to the outcome."""

    def __init__(self, loop, program, seconds, folder, stage):
        self._loop, self._program, self._seconds = loop, program, seconds
        self._folder, self._stage = folder, stage
        self._failure: str | None = None  # the failed step and the reason
        self._end: int | None = None  # completed steps, if training ended early

    def prepare(self, kind: Any, key: jax.Array) -> None:
        """Restores the last checkpoint, if any, and compiles the steps."""
        loop, program, seconds = self._loop, self._program, self._seconds
        start_s = time.perf_counter()
        args = program.params, program.aux, key
        state = loop.executor.replicate(loop.jit_init(kind, program, args)(*args))
        jax.block_until_ready(state)
        seconds["compile"] += time.perf_counter() - start_s
        self._state, self._first, stored_seconds = self._restore(state)
        seconds |= stored_seconds
        self._static = loop.executor.replicate(static_inputs(program))
        self._size = loop.steps_per_call(program)
        inputs = send_batches(program, loop.executor, 0, self._size)
        start_s = time.perf_counter()
        args = self._state, self._static, inputs
        self._compiled = loop.compile_steps(kind, program, args)
        seconds["compile"] += time.perf_counter() - start_s

    def _restore(self, initial: State) -> tuple[State, int, dict[str, float]]:
        """Returns the last checkpoint's state, step and wall times, or initial ones."""
        saved = checkpoint.restore(self._folder, initial, self._loop.on_warning)
        if saved is None:
            return initial, 0, {}
        state = self._loop.executor.replicate(saved.tree)
        return state, saved.step, saved.metadata["seconds"]

    def run_steps(self) -> None:
        """Runs the remaining steps and saves checkpoints in between."""
        total, every = self._program.steps, self._loop.config.checkpoint_steps
        self._stage.update(self._first, total)
        self._resumed_s = time.perf_counter()
        pending = None  # metrics of the last call, fetched while the next call runs
        for start in range(self._first, total, self._size):
            inputs = send_batches(self._program, self._loop.executor, start, self._size)
            # Row numbers are sent and metrics fetched explicitly; the guard rejects
            # any other transfer between host and devices.
            with jax.transfer_guard("disallow"):
                self._state, metrics = self._compiled(self._state, self._static, inputs)
            if pending is not None and self._process_metrics(*pending):
                return
            pending = metrics, start
            done = min(start + self._size, total)
            if done == total:  # so that a SIGTERM during the last call is noticed
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
            self._process_metrics(*pending)

    def _process_metrics(self, metrics: dict[str, jax.Array], start: int) -> bool:
        """Fetches the metrics of the steps from `start` on and displays the loss.

        Records and returns whether training ended, by a failure or the stop rule.
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
        """Saves a checkpoint after `done` steps, unless a step has failed."""
        jax.block_until_ready(self._state)
        self._seconds["steps"] += time.perf_counter() - self._resumed_s
        self._process_metrics(metrics, start)
        if not self._failure and (reason := _describe_nonfinite(self._state.params)):
            self._failure, self._end = f"step {done - 1}: {reason}", done
        if not self._failure:
            seconds = {clock: self._seconds[clock] for clock in ("start", "steps")}
            checkpoint.save(self._folder, done, self._state, {"seconds": seconds})
        self._resumed_s = time.perf_counter()

    def finish(self) -> Outcome:
        """Returns the outcome; after a failure, with restored parameters."""
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
        # After early stopping, only the state has the number of completed steps.
        steps = int(state.step)
        if failure and self._end is not None:
            steps = self._end
        self._stage.update(steps)
        diverged = failure or _describe_nonfinite(params)
        return Outcome(params, self._seconds, steps, diverged)


def _prepare_timed(method, problem) -> tuple[Program, dict[str, float]]:
    """Prepares the program twice: the first call compiles, the second is timed."""
    first_s = _prepare_program(method, problem)[1]
    program, start_s = _prepare_program(method, problem)
    seconds = {"start": start_s, "steps": 0.0, "compile": max(first_s - start_s, 0)}
    return program, seconds


def _prepare_program(method, problem) -> tuple[Program, float]:
    """Returns the method's program and the wall time of its preparation in seconds."""
    start_s = time.perf_counter()
    program = method(problem)
    tables = device_columns(program.table), program.sharded_tables
    inputs = program.frozen, program.aux, program.optimizer_inputs
    jax.block_until_ready((program.params, tables, inputs))
    return program, time.perf_counter() - start_s


def _describe_nonfinite(params: Params) -> str | None:
    """Returns a message that names a module with non-finite parameters, or None."""
    for module, tree in sorted(params.items()):
        if not all(np.isfinite(x).all() for x in jax.device_get(jax.tree.leaves(tree))):
            return f"parameters of {module} are not finite"
    return None


def _shape_key(tree: Any) -> tuple:
    """Returns the treedef, shapes and dtypes of a pytree, the key of its executable."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, str(x.dtype)) for x in leaves)
