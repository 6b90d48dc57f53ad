"""A whole run: its folder, its stages, its report.

Training the original, the retrained references and every unlearning method are stages
of the same kind. A finished stage is skipped; one that was cut off goes on from its
last checkpoint and ends with the same bits.
"""

import functools
import json
import pathlib
import shutil
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ccu_jax import (
    checkpoint,
    data,
    evaluate,
    features,
    limits,
    models,
    parallel,
    report,
    rows,
    unlearn_set,
    workdirs,
)
from ccu_jax import config as configs
from ccu_jax.config import Config
from ccu_jax.data import conditions
from ccu_jax.data.pipeline import OnHost
from ccu_jax.errors import UserError
from ccu_jax.loop import Loop
from ccu_jax.methods import METHODS, REFERENCES, Problem
from ccu_jax.models import TAIL, Model
from ccu_jax.parallel import EXECUTORS, Executor, barrier, is_first, shared
from ccu_jax.report import atomically


class Bench(NamedTuple):
    """Everything that the stages of a run share."""

    config: Config
    workdir: pathlib.Path
    reporter: report.Reporter
    executor: Executor
    data: data.Dataset
    conditions: dict[str, Any]  # what they came to
    model: Model
    forward: evaluate.Forward
    loop: Loop
    table: dict[str, Any]


def run(
    config: Config, workdir: pathlib.Path, purge: bool = False
) -> list[dict[str, Any]]:
    """Run everything that a configuration asks for and write the report.

    Args:
        config: what to do.
        workdir: a folder of this configuration, new or from an earlier run.
        purge: whether the forgotten pictures are then removed from the folder.

    Returns:
        The rows of `results.json`: one per method and seed, earlier ones included.

    Raises:
        UserError: what the user can mend.
    """
    methods = list(dict.fromkeys(("original", *config.methods)))
    _check(config, methods)
    # Each process would go by the finished stages that it sees.
    if not shared(workdir):
        raise UserError(
            f"--workdir {workdir} is not one folder that all processes share: give "
            "such a one (NFS, Filestore, a mounted bucket)"
        )
    rows.commit()
    workdirs.refuse(config, workdir)
    reporter = report.Reporter(workdir, is_first())
    try:
        titles = [_title(s, m) for s in config.seeds for m in methods]
        reporter.plan(["data", *titles, "report", *(["purge"] if purge else [])])
        with reporter.stage("data") as stage:
            bench = _bench(config, workdir, reporter, stage)
            # All that can be wrong is found before the first step and the first file.
            drawn = {seed: _draw(bench, seed, methods) for seed in config.seeds}
            _check_purged(bench, methods)
        place = functools.partial(workdirs.unlearn_file, workdir)
        files = {place(seed): text for seed, (_, text) in drawn.items()}
        files |= workdirs.near(bench, drawn)
        workdirs.claim(config, workdir, files)
        for seed, (sets, _) in drawn.items():
            _seed(bench, seed, sets, methods)
        with reporter.stage("report"):
            found = rows.read_all(workdir)
            if is_first():
                report.write(workdir, found, configs.to_json(config))
        report.show(found, reporter)
        reporter.say(f"report: {workdir / 'report.html'}")
        if purge:
            workdirs.purge(bench)
        return found
    finally:
        reporter.close()


def _title(seed, method):
    return f"seed {seed}: {method}"


def _check(config, methods):
    if config.run.executor not in EXECUTORS:
        raise UserError(
            f"run.executor={config.run.executor!r}: there is {', '.join(EXECUTORS)}"
        )
    if config.run.pictures not in ("auto", "device", "host"):
        raise UserError(
            f"run.pictures={config.run.pictures!r}: there is auto, device, host"
        )
    if config.run.features not in ("stored", "computed"):
        raise UserError(
            f"run.features={config.run.features!r}: there is stored, computed"
        )
    limits.check(config)
    limits.check_batches(config, methods, jax.device_count())


def _draw(bench, seed, methods) -> tuple[unlearn_set.Sets, str]:
    """A seed's sets, and the unlearn set as text; what is finished must fit to them."""
    for method in methods:
        _finished(bench, seed, method)
    config = bench.config.unlearn
    sets = unlearn_set.draw(
        bench.data, config.rule, seed, config.unseen, config.duplicates
    )
    text = unlearn_set.describe(bench.data, sets, seed, config.rule, config.duplicates)
    path = workdirs.unlearn_file(bench.workdir, seed)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(
            f"the unlearn set is another one than in {path}: give another --workdir, "
            "or remove the folder to start anew"
        )
    return sets, text


def _bench(config, workdir, reporter, stage) -> Bench:
    found = rows.read_all(workdir)
    expected = found[0]["fingerprint"] if found else None
    if is_first():
        loaded = data.load(config.data, workdir, stage.tell, expected)
    barrier("data")
    if not is_first():
        loaded = data.load_prepared(config.data, workdir)
    if loaded.edition == "sample":
        reporter.warn(
            f"SAMPLE EDITION for {config.name}: generated in the official format. Give "
            "the real files with --data-dir."
        )
    elif loaded.edition == "clipart":
        reporter.warn("CLIP ART: drawings that come with the package, not photographs")
    counts = ", ".join(f"{k} {v:,}" for k, v in loaded.counts.items() if v)
    reporter.say(f"{loaded.name}: {counts}")
    loaded, told = conditions.apply(loaded, config.conditions)
    if told:
        reporter.say(f"conditions: {json.dumps(told)}")
    executor = EXECUTORS[config.run.executor]()
    model = models.build(
        config.model,
        classes=len(loaded.classes),
        vocabulary=loaded.vocabulary,
        image_size=config.data.image_size,
        text_length=config.data.text_length,
    )
    return Bench(
        config=config,
        workdir=workdir,
        reporter=reporter,
        executor=executor,
        data=loaded,
        conditions=told,
        model=model,
        forward=evaluate.Forward(model, executor, config.run.evaluate_batch),
        loop=Loop(config.run, executor, reporter.warn),
        table=_table(config, loaded, executor),
    )


def _table(config, loaded, executor):
    """All rows: on the devices, the pictures too unless they are too large for that."""
    names = ("text", "labels", "has_image", "has_text")
    table = {name: np.asarray(getattr(loaded, name)) for name in names}
    image = OnHost(loaded.image, loaded.has_image)
    kept = config.run.pictures
    if kept == "auto":
        kept = "device" if parallel.fits(loaded.image.nbytes) else "host"
    if kept == "host":
        return executor.place(table) | {"image": image}
    rows = np.arange(len(loaded.id))
    return executor.place(table | {"image": image.take(rows)})


def _check_purged(bench, methods):
    """Refuse to go on with pictures that are not there any more."""
    for seed in bench.config.seeds if bench.data.purged else ():
        for method in methods:
            if _finished(bench, seed, method) is None:
                raise UserError(
                    f"the pictures to forget were purged from {bench.workdir}: what is "
                    f"finished can be shown, but {method} of seed {seed} cannot be "
                    "run; give another --workdir"
                )


def _seed(bench: Bench, seed: int, sets: unlearn_set.Sets, methods: list[str]):
    """All methods of one seed, the original first."""
    problem = Problem(
        config=bench.config,
        model=bench.model,
        forward=bench.forward,
        executor=bench.executor,
        table=bench.table,
        sets=sets,
        multi_label=bench.data.multi_label,
        params=None,
        seed=seed,
        arrival=conditions.arrival(bench.data, bench.config.conditions.order),
    )
    for method in methods:
        if _finished(bench, seed, method) is None:
            if method not in REFERENCES and problem.params is None:
                problem = problem._replace(params=_original(bench, seed))
            with bench.reporter.stage(_title(seed, method)) as stage:
                began = time.perf_counter()
                if problem.params is not None and problem.store is None:
                    problem = problem._replace(store=_store(bench, problem, stage))
                _stage(bench, problem, method, stage, began)


def _place_of(bench, seed, method):
    return bench.workdir / "checkpoints" / f"{method}-{seed}"


def _finished(bench, seed, method) -> dict | None:
    """The row of a stage that is finished and belongs to these data."""
    path = rows.place(bench.workdir, seed, method)
    if not path.exists():
        return None
    row = rows.read(path)
    if row["fingerprint"] != bench.data.fingerprint:
        raise UserError(
            f"the data have changed since {bench.workdir} was made: give another "
            "--workdir, or remove the folder to start anew"
        )
    return row


def _original(bench, seed):
    shapes = jax.eval_shape(bench.model.init, jax.random.key(0))
    folder = _place_of(bench, seed, "original") / "params"
    saved = checkpoint.restore(folder, shapes, bench.reporter.warn)
    if saved is None:
        raise UserError(
            f"the original's checkpoint in {folder} is missing or damaged: remove "
            f"{rows.place(bench.workdir, seed, 'original')} to train it again"
        )
    return bench.executor.place(saved.tree)


def _store(bench, problem, stage) -> features.Store:
    folder = _place_of(bench, problem.seed, "original") / "features"
    tell = functools.partial(stage.tell, "storing features")
    return features.stored(folder, problem, bench.data.fingerprint, tell)


def _stage(bench: Bench, problem: Problem, method: str, stage, began: float) -> None:
    """Run one method, evaluate it, store all of it; the record comes last.

    `began`: on `time.perf_counter`; the original's features were stored since then,
    or opened.
    """
    seed, opened = problem.seed, time.perf_counter() - began
    folder = _place_of(bench, seed, method)
    # Of these data: steps made with others are not gone on from.
    steps = folder / f"steps-{bench.data.fingerprint[:12]}"
    outcome = bench.loop.run(method, METHODS[method], problem, steps, stage)
    params = {**(problem.params or {}), **outcome.params}
    checkpoint.save(
        folder / "params", outcome.steps, params, {"method": method, "seed": seed}
    )
    start = time.perf_counter()
    seconds = dict(outcome.seconds)
    seconds["unlearn"] = seconds["start"] + seconds["steps"]
    seconds["features"] = opened
    store = problem.store
    if method == "original":
        trained = problem._replace(params=bench.executor.place(params))
        store = _store(bench, trained, stage)
        seconds["features"] = time.perf_counter() - start
        start = time.perf_counter()
    # Where trunk and text branch are the original's, so is what they say of each row.
    same = method == "original" or not set(outcome.params) - set(TAIL)
    table = store.table(bench.table) if same else bench.table
    results = evaluate.results(bench.forward, params, table, bench.data, problem.sets)
    seconds["evaluate"] = time.perf_counter() - start
    seconds["total"] = time.perf_counter() - began
    if is_first():
        path = bench.workdir / "outputs" / f"{method}-{seed}.npz"
        path.parent.mkdir(exist_ok=True)
        atomically(path, evaluate.to_bytes(results))
        row = rows.make(
            problem._replace(method=method),
            bench.data,
            bench.conditions,
            bench.workdir,
            outcome,
            results,
            seconds,
        )
        path = rows.place(bench.workdir, seed, method)
        path.parent.mkdir(exist_ok=True)
        atomically(path, (json.dumps(row, indent=1) + "\n").encode())
        shutil.rmtree(steps, ignore_errors=True)
    barrier(f"{method}-{seed}")
