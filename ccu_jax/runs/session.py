"""Opens a run: validates input, locks the folder, loads the data, draws the sets."""

import collections
import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ccu_jax import data, models
from ccu_jax.config.schema import Config, check_batches, from_json, to_json
from ccu_jax.data import Dataset, corruptions
from ccu_jax.distributed import hosts
from ccu_jax.distributed.device_tables import HostColumn
from ccu_jax.distributed.executors import EXECUTORS, Executor, fits_on_devices
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
    write_if_changed,
)
from ccu_jax.train.loop import Loop
from ccu_jax.unlearn_sets.rules import check_rule
from ccu_jax.unlearn_sets.splits import Sets


@contextlib.contextmanager
def open_run(
    config: Config, workdir: pathlib.Path, titles: list[str]
) -> Iterator[tuple[RunContext, dict[int, Sets]]]:
    """Opens a run in its working folder; yields its context and the sets by seed.

    All input is validated before the first training step, and before anything except
    data and logs is written. `titles` names the stages that follow the methods.

    Raises UserError if the configuration, the data or the folder is invalid.
    """
    methods = list(dict.fromkeys(("original", *config.methods)))
    from_json(to_json(config))  # checks every value
    check_rule(config.unlearn.rule)
    check_batches(config, methods, jax.device_count())
    # Otherwise processes would skip different stages, and then wait for each other.
    if not hosts.probe_shared_folder(workdir):
        raise UserError(
            f"--workdir {workdir}: not shared by all processes; use a shared folder "
            "(NFS, Filestore, a mounted bucket)"
        )
    source_commit()  # cached, as the checkout may change during the run
    reject_external_links(workdir, config.run.allow_external_links)
    with hosts.synchronize_preemption(), lock_workdir(workdir):
        check_same_config(config, workdir)
        with contextlib.closing(Reporter(workdir, hosts.is_primary())) as reporter:
            stages = [stage_title(s, m) for s in config.seeds for m in methods]
            reporter.plan(["data", *stages, *titles])
            yield _prepare(config, workdir, reporter, methods)


def _prepare(
    config: Config, workdir: pathlib.Path, reporter: Reporter, methods: list[str]
) -> tuple[RunContext, dict[int, Sets]]:
    """Loads the data, draws the sets, and writes them and the configuration."""
    runs: collections.Counter[str] = collections.Counter()
    sets_by_seed: dict[int, Sets] = {}
    texts: dict[pathlib.Path, str] = {}
    with reporter.stage("data") as stage:
        ctx = _build_context(config, workdir, reporter, stage)
        for seed in config.seeds:
            for method in methods:
                if load_result_if_finished(ctx, seed, method) is not None:
                    continue
                if ctx.data.purged:
                    raise UserError(
                        f"{workdir}: the unlearned images were purged, so {method} of "
                        f"seed {seed} cannot run (finished results remain readable); "
                        "use another --workdir"
                    )
                runs[method] += 1
            sets_by_seed[seed] = draw_sets(ctx, seed)
            texts |= unlearn_set_files(ctx, seed, sets_by_seed[seed])
    write_config(config, workdir)
    write_if_changed(texts)
    if runs:
        reporter.log(forecast.describe_runs(ctx, runs))
    return ctx, sets_by_seed


def _build_context(
    config: Config, workdir: pathlib.Path, reporter: Reporter, stage: Stage
) -> RunContext:
    """Loads and corrupts the data, and builds the model and its executables."""
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
    """Prepares the data on process 0, loads them on all and logs the row counts."""
    results = load_all_results(workdir)
    fingerprint = results[0]["fingerprint"] if results else None
    dataset = hosts.run_on_primary(
        lambda progress: data.load(config.data, workdir, progress, fingerprint),
        stage.report_progress,
    )
    if dataset is None:
        dataset = data.load_prepared(config.data, workdir)
    if dataset.edition == "sample":
        reporter.warn(
            f"SAMPLE EDITION for {config.name}: generated in the official format. Pass "
            "the real files with --data-dir."
        )
    elif dataset.edition == "clipart":
        reporter.warn("CLIP ART: drawings included in the package, not photographs")
    counts = ", ".join(f"{k} {v:,}" for k, v in dataset.counts.items() if v)
    reporter.log(f"{dataset.name}: {counts}")
    return dataset


def _build_table(
    config: Config, dataset: Dataset, executor: Executor
) -> dict[str, Any]:
    """Replicates all columns; images stay on the host if they exceed device memory."""
    names = ("text", "labels", "has_image", "has_text")
    table = {name: np.asarray(getattr(dataset, name)) for name in names}
    image = HostColumn(dataset.image, dataset.has_image)
    placement = config.run.image_placement
    has_space = placement == "auto" and fits_on_devices(dataset.image.nbytes)
    if placement == "device" or has_space:
        rows = np.arange(len(dataset.id))
        return executor.replicate(table | {"image": image.take(rows)})
    return executor.replicate(table) | {"image": image}
