"""What a request costs as the stored training set grows, to a million rows.

For each number of stored rows there is a process that does nothing but unlearn: first
beside the fewest rows, then beside so many, and what its memory grows by is theirs. All
have as many rows to forget.
"""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import tempfile
import threading
import time
from typing import Any

import numpy as np

from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks import scale_problem as bench_scale_problem
from ccu_jax.benchmarks.harness import Child, in_turn, serve, spread
from ccu_jax.benchmarks.prepare import memory_mib
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store as features

LEAST = 1000  # stored rows: the sets must fit into them
UNLEARN, HELD, RETAIN = 100, 150, 500  # rows that a request works on
_MODULE = "ccu_jax.benchmarks.scale_store"
_FACTS = {"checkpoint": "random", "fingerprint": "bench"}
_SPARE = 256 << 20  # bytes that stay free on the disk
_EVERY_S = 0.002  # between looks at the memory
# A process's own memory, and pages of mapped files: the system has these back when it
# wants them, and maps many around each that is read.
_MEMORY = {"own": "RssAnon", "mapped": "RssFile"}


def check(preset: str, stored, folder: pathlib.Path) -> None:
    """Refuses what the disk has no room for.

    Raises:
        UserError: how much there is, and how much is needed.
    """
    each = bench_scale_problem.row_bytes(bench_problem.PRESETS[preset])
    needed, free = sum(stored) * each, shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise UserError(
            f"--stored: {sum(stored):,} rows take {needed / 2**20:,.0f} MiB, and "
            f"{folder} has {free / 2**20:,.0f} MiB free: give fewer, or another --dir"
        )


def measure(preset: str, stored, windows: int, folder, tell) -> dict[str, Any]:
    """The same request beside stores of different sizes, in turn.

    Args:
        preset: of the model.
        stored: numbers of stored rows, rising.
        windows: runs of each.
        folder: in which the stores are, for as long as it takes.
        tell: progress.
    """
    sizes = bench_problem.PRESETS[preset]
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        place, children = pathlib.Path(place), []
        wrote = [_write(sizes, rows, place / str(rows), tell) for rows in stored]
        for rows in stored:
            tell("starting processes", len(children), len(stored))
            small, large = ((n, str(place / str(n))) for n in (stored[0], rows))
            spec = {"preset": preset, "small": small, "large": large}
            child = Child(f"{rows:,} stored rows", _MODULE, spec, place)
            stack.callback(child.close)
            child.answer()
            children.append(child)
        calls = [functools.partial(child.ask, what="window") for child in children]
        found = in_turn(calls, windows, tell)
        memory = [child.ask(what="memory") for child in children]
    each = bench_scale_problem.row_bytes(sizes)
    told = [
        {
            "rows": rows,
            "disk_mib": rows * each / 2**20,
            "write_s": write_s,
            **{
                name: spread([took[name] for took in windows_of])
                for name in ("open", "start", "steps", "seconds")
            },
            "to_first": spread(
                [
                    a["seconds"] / b["seconds"]
                    for a, b in zip(windows_of, found[0], strict=True)
                ]
            ),
            "memory_mib": memory_of,
        }
        for rows, write_s, windows_of, memory_of in zip(
            stored, wrote, found, memory, strict=True
        )
    ]
    return {"unlearn": UNLEARN, "held": HELD, "retain": RETAIN, "sizes": told}


def _write(sizes, rows, folder, tell) -> float:
    """A store of random features, chunk by chunk; the seconds it took."""
    columns = bench_scale_problem.random_columns(sizes, np.random.default_rng(rows))
    began = time.perf_counter()
    tell_rows = functools.partial(tell, f"writing {rows:,} rows")
    features.write(folder, _FACTS, rows, columns, tell_rows)
    return time.perf_counter() - began


# --- the process that unlearns --------------------------------------------------------


def _prepare(spec):
    sizes = bench_problem.PRESETS[spec["preset"]]
    small, large = (
        (sizes._replace(rows=rows), pathlib.Path(folder))
        for rows, folder in (spec["small"], spec["large"])
    )
    # All is compiled beside few rows first: what compiling takes is not counted.
    problem = _problem(*small)
    run = bench_scale_problem.unlearner(problem, small[1])
    run()
    run()
    before = _most(run)["own"]
    if large != small:
        problem = _beside(problem, large[0])

    def window():
        began = time.perf_counter()
        store = _open(large[1])
        opened = time.perf_counter() - began
        took = run(problem._replace(store=store))
        seconds = opened + took["start"] + took["steps"]
        return {"open": opened, **took, "seconds": seconds}

    def answer(what):
        if what == "window":
            return window()
        most = _most(window)
        more = None if before is None else most["own"] - before
        return {"before": before, **most, "more": more}

    return answer


def _most(run) -> dict[str, float | None]:
    """The most memory while something runs, in MiB; None where no system tells."""
    most, done = dict.fromkeys(_MEMORY), threading.Event()

    def look():
        while not done.wait(_EVERY_S):
            for name, of in _MEMORY.items():
                now = memory_mib(of)
                if now is not None:
                    most[name] = max(now, most[name] or 0.0)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return most


def _problem(sizes, folder):
    sets = bench_scale_problem.sets_of(sizes, UNLEARN, HELD)
    problem = bench_scale_problem.make(sizes, "pmap", sets, _open(folder))
    config = problem.config
    plus = dataclasses.replace(config.ccu_plus, max_retain_rows=RETAIN)
    return problem._replace(config=dataclasses.replace(config, ccu_plus=plus))


def _beside(problem, sizes):
    """The same model and the same programs, and so many rows."""
    return problem._replace(
        sets=bench_scale_problem.sets_of(sizes, UNLEARN, HELD),
        table=problem.executor.replicate(bench_scale_problem.table_of(sizes)),
    )


def _open(folder):
    store = features.read(folder, _FACTS)
    if store is None:
        raise UserError(f"the store of features in {folder} cannot be read")
    return store


if __name__ == "__main__":
    serve(_prepare)
