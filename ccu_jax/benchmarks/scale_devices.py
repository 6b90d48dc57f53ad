"""Steps on simulated devices and in several processes, and what collectives take.

Each number of devices needs a process of its own. All of them share the machine's
cores: what is measured is what cutting the work costs, not what devices would gain.
"""

import contextlib
import functools
import pathlib
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax.benchmarks import costs as bench_cost
from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks import scale_problem as bench_scale_problem
from ccu_jax.benchmarks.harness import Child, free_port, in_turn, serve, spread
from ccu_jax.distributed import executors as parallel
from ccu_jax.distributed import hosts as processes
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.evaluate.forward import Forward
from ccu_jax.train import step

NAMES = ("original", "ccu_plus")
_MODULE = "ccu_jax.benchmarks.scale_devices"
_STEPS = 8  # of a window: ccu_plus makes one refresh in so many
_WEAK_AT = 2  # so many devices have the configured batch in weak scaling, too
_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(
    rf"^\s*(?:ROOT )?%?([\w.-]+) = .*? (?:{_COLLECTIVES})(?:-start)?\(", re.MULTILINE
)
_WAITING = "Wait: pending_threads"


class Case(NamedTuple):
    """So many devices in all, in so many processes."""

    devices: int
    processes: int

    def factors(self) -> dict[str, float]:
        """The batch, relative to the configured one: of strong and weak scaling."""
        return {"strong": 1.0, "weak": self.devices / _WEAK_AT}


class Work(NamedTuple):
    """What a process measures: a method, its batch, and the executor's devices.

    `shares` is None on real devices; else `vmap` makes believe so many on one.
    """

    method: str
    factor: float
    shares: int | None = None


# --- the process that measures --------------------------------------------------------


class _Steps:
    """Some steps of a method as one compiled call."""

    def __init__(self, spec, work: Work):
        self.sizes = bench_problem.PRESETS[spec["preset"]]
        if work.shares is None:
            executor = EXECUTORS[spec["executor"]]()
        else:
            executor = parallel.vmap(work.shares)
        problem = _scaled(self.sizes, spec["preset"], executor, work.factor)
        problem = problem._replace(method=work.method)
        program = bench_problem.stepping(work.method, problem)
        self._executor, key = executor, problem.key("steps")
        plan = {n: np.resize(x, (_STEPS, x.shape[1])) for n, x in program.plan.items()}
        program = program._replace(plan=plan)
        self._first, self._resident, self._share = bench_cost.given(
            program, executor, key, _STEPS
        )
        made = executor.compile(step.make_steps(program), donate=True)
        self._compiled = made.lower(self._first, self._resident, self._share).compile()
        self.collectives = set(_COLLECTIVE.findall(self._compiled.as_text()))

    def window(self) -> float:
        """Milliseconds of a step."""
        state = jax.tree.map(lambda x: x.copy(), self._first)
        state = jax.block_until_ready(self._executor.replicate(state))
        began = time.perf_counter()
        state, _ = self._compiled(state, self._resident, self._share)
        jax.block_until_ready(state)
        return 1e3 * (time.perf_counter() - began) / _STEPS

    def profile(self) -> dict[str, float | None]:
        """Shares of the devices' time in collectives, and waiting there."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                spent_ms = self.window() * _STEPS
            (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
            found = _summed(path, self.collectives)
        total_ns = 1e6 * spent_ms * jax.local_device_count()
        return {name: ns / total_ns for name, ns in found.items()}


def _scaled(sizes, preset, executor, factor):
    """A problem with stored features whose batches are so many times the usual."""
    problem = _problem(preset, executor)
    config = bench_problem.with_batches(
        problem.config, lambda field, old: max(1, round(factor * old))
    )
    return problem._replace(config=config)


def _problem(preset, executor):
    sizes = bench_problem.PRESETS[preset]
    store = bench_scale_problem.random_store(sizes)
    problem = bench_problem.make(sizes)
    # The same rows for every number of devices, wherever they lie.
    place = executor.replicate
    return problem._replace(
        executor=executor,
        forward=Forward(problem.model, executor, problem.config.run.evaluate_batch),
        table=place(jax.device_get(problem.table)),
        params=place(jax.device_get(problem.params)),
        store=store,
    )


def _summed(path, collectives) -> dict[str, float]:
    """Nanoseconds of events that are collectives, and of waiting for each other."""
    found = {"collectives": 0.0, "waiting": 0.0}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in collectives:
                    found["collectives"] += event.duration_ns
                elif event.name.startswith(_WAITING):
                    found["waiting"] += event.duration_ns
    return found


def _prepare(spec):
    if spec["hosts"]:
        processes.join_hosts(spec["hosts"])
    steps = [_Steps(spec, Work(*work)) for work in spec["work"]]

    def answer(what, place):
        return {"told": getattr(steps[place], what)()}

    return answer


# --- the one that asks ----------------------------------------------------------------


class _Group:
    """The processes of one case."""

    def __init__(self, stack, case: Case, work, spec, folder):
        self.case, self.work = case, work
        address = f"127.0.0.1:{free_port()}"
        self._children = []
        for index in range(case.processes):
            hosts = {
                "coordinator_address": address,
                "num_processes": case.processes,
                "process_id": index,
            }
            spec = {**spec, "work": work}
            spec["hosts"] = hosts if case.processes > 1 else None
            title = f"{case.devices} devices in {case.processes} processes"
            each = case.devices // case.processes
            child = Child(title, _MODULE, spec, folder, each)
            stack.callback(child.close)
            self._children.append(child)
        for child in self._children:
            child.answer()

    def ask(self, what: str, place: int) -> list[Any]:
        """What each process says."""
        for child in self._children:
            child.send(what=what, place=place)
        return [child.answer()["told"] for child in self._children]


def cases(devices, processes) -> list[Case]:
    """What can be: as many devices in each process, at least one."""
    return [Case(d, p) for p in processes for d in devices if d >= p and d % p == 0]


def measure(
    preset, executor, devices, processes, windows, tell, methods=NAMES
) -> dict[str, Any]:
    """Every case by strong and weak scaling, beside one device with the same work.

    Args:
        preset: of the rows and the model.
        executor: a row of `parallel.EXECUTORS`; not `vmap`.
        devices: numbers of simulated devices, 1 among them.
        processes: numbers of processes, 1 among them.
        windows: of each, in turn.
        tell: progress.
        methods: whose steps.
    """
    found = cases(devices, processes)
    alone = Case(1, 1)
    spec = {"preset": preset, "executor": executor}
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        groups = []
        for number, case in enumerate(found):
            tell("compiling for devices", number, len(found))
            work = _work(methods, case, found if case == alone else ())
            groups.append(_Group(stack, case, work, spec, folder))
        tell("compiling for devices", len(found), len(found))
        asked = [(group, place) for group in groups for place in range(len(group.work))]
        calls = [functools.partial(group.ask, "window", p) for group, p in asked]
        # Processes that wait for each other end together: the last one counts.
        took = [list(map(max, w)) for w in in_turn(calls, windows, tell)]
        of = {(g.case, g.work[p]): ms for (g, p), ms in zip(asked, took, strict=True)}
        profiles = {
            (group.case, group.work[p]): group.ask("profile", p)
            for group, p in asked
            if group.case != alone
        }
    told = [
        _told(of, profiles, case, method, kind)
        for method in methods
        for case in found
        for kind in case.factors()
        if kind == "strong" or case != alone
    ]
    return {"steps": _STEPS, "executor": executor, "cases": told}


def _work(methods, case, others):
    """What a case measures; one device does the work of all others as well."""
    work = [Work(m, f) for m in methods for f in case.factors().values()]
    for other in others:
        for method in methods:
            work += [Work(method, factor) for factor in other.factors().values()]
            if other.devices > 1:
                work.append(Work(method, 1.0, other.devices))
    return list(dict.fromkeys(work))


def _told(of, profiles, case, method, kind):
    factor = case.factors()[kind]
    mine, alone = of[case, Work(method, factor)], of[Case(1, 1), Work(method, factor)]
    cut = of.get((Case(1, 1), Work(method, factor, case.devices)))
    shares = profiles.get((case, Work(method, factor)), [])

    def ratio(one, other):
        # In the same window: what else the machine does then falls on both.
        return spread([a / b for a, b in zip(one, other, strict=True)])

    return {
        "method": method,
        "scaling": kind,
        "devices": case.devices,
        "processes": case.processes,
        "batch": factor,
        "ms": spread(mine),
        "to_one": ratio(mine, alone),
        "cut_to_one": ratio(cut, alone) if cut else None,
        **{
            name: float(np.mean([share[name] for share in shares])) if shares else None
            for name in ("collectives", "waiting")
        },
    }


if __name__ == "__main__":
    serve(_prepare)
