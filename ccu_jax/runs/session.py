"""Opens a run: locks its folder, loads the data, draws the unlearn sets, checks all."""

import collections
import contextlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ccu_jax import data, models
from ccu_jax.config.schema import Config, check_batches, check_values
from ccu_jax.data import Dataset, corruptions
from ccu_jax.distributed.device_tables import HostColumn
from ccu_jax.distributed.executors import EXECUTORS, Executor, fits
from ccu_jax.distributed.hosts import (
    is_primary,
    is_shared_folder,
    run_on_primary,
    stopping_together,
)
from ccu_jax.errors import UserError
from ccu_jax.evaluate.forward import Forward
from ccu_jax.runs import forecast
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import Reporter, Stage
from ccu_jax.runs.results import load_all_results, source_commit
from ccu_jax.runs.stages import draw_sets, load_result_if_finished, stage_title
from ccu_jax.runs.workdir import (
    check_same_config,
    lock_workdir,
    reject_external_links,
    unlearn_set_files,
    write_config,
)
from ccu_jax.train.loop import Loop
from ccu_jax.unlearn_sets.rules import check_rule
from ccu_jax.unlearn_sets.splits import Sets

# The context, the sets of each seed, and the methods with the original first.
Session = tuple[RunContext, dict[int, Sets], list[str]]


@contextlib.contextmanager
def open_run(
    config: Config, workdir: pathlib.Path, titles: list[str]
) -> Iterator[Session]:
    """Opens a run in its working folder until the block ends.

    All input is checked before the first training step, and before anything but data
    and logs is written. `titles` are those of the stages that follow the methods.

    Raises:
        UserError: the configuration, the data or the folder cannot be used.
    """
    methods = list(dict.fromkeys(("original", *config.methods)))
    check_values(config)
    check_rule(config.unlearn.rule)
    check_batches(config, methods, jax.device_count())
    # Every process skips the finished stages that it finds in the folder.
    if not is_shared_folder(workdir):
        raise UserError(
            f"--workdir {workdir}: not shared by all processes; use a shared folder "
            "(NFS, Filestore, a mounted bucket)"
        )
    source_commit()
    reject_external_links(workdir, config.run.allow_external_links)
    with stopping_together(), lock_workdir(workdir):
        check_same_config(config, workdir)
        with _open_locked(config, workdir, titles, methods) as session:
            yield session


@contextlib.contextmanager
def _open_locked(
    config: Config, workdir: pathlib.Path, titles: list[str], methods: list[str]
) -> Iterator[Session]:
    reporter = Reporter(workdir, is_primary())
    try:
        stages = [stage_title(s, m) for s in config.seeds for m in methods]
        reporter.plan(["data", *stages, *titles])
        with reporter.stage("data") as stage:
            ctx = _build_context(config, workdir, reporter, stage)
            missing = {seed: _missing(ctx, seed, methods) for seed in config.seeds}
            sets_by_seed = {seed: draw_sets(ctx, seed) for seed in config.seeds}
            _check_not_purged(ctx, missing)
            texts = {}
            for seed, sets in sets_by_seed.items():
                texts |= unlearn_set_files(ctx, seed, sets)
        write_config(config, workdir, texts)
        if runs := collections.Counter(itertools.chain(*missing.values())):
            reporter.log(forecast.describe_runs(ctx, runs))
        yield ctx, sets_by_seed, methods
    finally:
        reporter.close()


def _missing(ctx: RunContext, seed: int, methods: list[str]) -> list[str]:
    """Returns the methods that are not finished; checks the results of the others."""
    return [m for m in methods if load_result_if_finished(ctx, seed, m) is None]


def _check_not_purged(ctx: RunContext, missing: dict[int, list[str]]) -> None:
    """Rejects new stages on a folder whose images were purged."""
    for seed, methods in missing.items() if ctx.data.purged else ():
        if methods:
            raise UserError(
                f"{ctx.workdir}: the unlearned images were purged, so finished results "
                f"can be shown, but {methods[0]} of seed {seed} cannot be run; use "
                "another --workdir"
            )


def _build_context(
    config: Config, workdir: pathlib.Path, reporter: Reporter, stage: Stage
) -> RunContext:
    dataset = _load_data(config, workdir, reporter, stage)
    dataset, changes = corruptions.apply(dataset, config.corruptions)
    if changes:
        reporter.log(f"corruptions: {json.dumps(changes)}")
    executor = EXECUTORS[config.run.executor]()
    model = models.build(
        config.model,
        num_classes=len(dataset.classes),
        vocab_size=dataset.vocabulary,
        image_size=config.data.image_size,
        text_length=config.data.text_length,
    )
    return RunContext(
        config=config,
        workdir=workdir,
        reporter=reporter,
        executor=executor,
        data=dataset,
        corruptions=changes,
        model=model,
        forward=Forward(model, executor, config.run.evaluate_batch),
        loop=Loop(config.run, executor, reporter.warn),
        table=_build_table(config, dataset, executor),
    )


def _load_data(
    config: Config, workdir: pathlib.Path, reporter: Reporter, stage: Stage
) -> Dataset:
    """Prepares the data on process 0, loads it on all and logs what it is."""
    results = load_all_results(workdir)
    fingerprint = results[0]["fingerprint"] if results else None
    dataset = run_on_primary(
        lambda progress: data.load(config.data, workdir, progress, fingerprint),
        stage.report_progress,
    )
    if dataset is None:
        dataset = data.load_prepared(config.data, workdir)
    if dataset.edition == "sample":
        reporter.warn(
            f"SAMPLE EDITION for {config.name}: generated in the official format. Give "
            "the real files with --data-dir."
        )
    elif dataset.edition == "clipart":
        reporter.warn("CLIP ART: drawings that come with the package, not photographs")
    counts = ", ".join(f"{k} {v:,}" for k, v in dataset.counts.items() if v)
    reporter.log(f"{dataset.name}: {counts}")
    return dataset


def _build_table(
    config: Config, dataset: Dataset, executor: Executor
) -> dict[str, Any]:
    """Puts all columns on the devices; images stay on the host if they do not fit."""
    names = ("text", "labels", "has_image", "has_text")
    table = {name: np.asarray(getattr(dataset, name)) for name in names}
    image = HostColumn(dataset.image, dataset.has_image)
    placement = config.run.image_placement
    if placement == "auto":
        placement = "device" if fits(dataset.image.nbytes) else "host"
    if placement == "host":
        return executor.replicate(table) | {"image": image}
    rows = np.arange(len(dataset.id))
    return executor.replicate(table | {"image": image.take(rows)})
