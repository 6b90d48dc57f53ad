"""Opens a run: locks its folder, loads the data, draws the unlearn sets, checks all."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from ccu_jax import data, models
from ccu_jax.config.schema import Config, check_batches, check_values
from ccu_jax.data import corruptions
from ccu_jax.distributed import peers
from ccu_jax.distributed.device_tables import HostColumn
from ccu_jax.distributed.executors import EXECUTORS, fits
from ccu_jax.distributed.hosts import barrier, is_primary, is_shared_folder
from ccu_jax.errors import UserError
from ccu_jax.evaluate.forward import Forward
from ccu_jax.runs import forecast, results, stages
from ccu_jax.runs import workdir as workdirs
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import Reporter
from ccu_jax.train.loop import Loop
from ccu_jax.unlearn_sets import rules
from ccu_jax.unlearn_sets.splits import Sets


@contextlib.contextmanager
def open_run(
    config: Config, workdir: pathlib.Path, titles: list[str]
) -> Iterator[tuple[RunContext, dict[int, Sets], list[str]]]:
    """The folder of a run, with its data and what each seed forgets, all checked.

    All that can be wrong is found before the first step and the first file.

    Args:
        config: as of `run`.
        workdir: likewise.
        titles: of the stages that follow after those of its methods.

    Yields:
        The ctx, the sets of every seed, and the methods, the original first.

    Raises:
        UserError: what the user can mend.
    """
    methods = list(dict.fromkeys(("original", *config.methods)))
    _check(config, methods)
    # Each process would go by the finished stages that it sees.
    if not is_shared_folder(workdir):
        raise UserError(
            f"--workdir {workdir} is not one folder that all processes share: give "
            "such a one (NFS, Filestore, a mounted bucket)"
        )
    results.source_commit()
    workdirs.reject_external_links(workdir, config.run.allow_external_links)
    with (
        peers.watched(workdir, config.run.hang_timeout_s),
        workdirs.lock_workdir(workdir),
    ):
        workdirs.check_same_config(config, workdir)
        with _open_locked(config, workdir, titles, methods) as found:
            yield found


@contextlib.contextmanager
def _open_locked(config, workdir, titles, methods):
    """What `opened` gives, in a folder that is this run's."""
    reporter = Reporter(workdir, is_primary())
    try:
        told = [stages.stage_title(s, m) for s in config.seeds for m in methods]
        reporter.plan(["data", *told, *titles])
        with reporter.stage("data") as stage:
            ctx = _build_context(config, workdir, reporter, stage)
            drawn = {seed: _draw(ctx, seed, methods) for seed in config.seeds}
            _check_purged(ctx, methods)
            files = {}
            for seed, sets in drawn.items():
                files |= workdirs.unlearn_set_files(ctx, seed, sets)
        workdirs.write_config(config, workdir, files)
        todo = {
            seed: [
                m
                for m in methods
                if stages.load_result_if_finished(ctx, seed, m) is None
            ]
            for seed in drawn
        }
        if any(todo.values()):
            reporter.log(forecast.describe_stages(ctx, todo))
        yield ctx, drawn, methods
    finally:
        reporter.close()


def _check(config, methods):
    check_values(config)
    rules.check_rule(config.unlearn.rule)
    check_batches(config, methods, jax.device_count())


def _draw(ctx: RunContext, seed, methods) -> Sets:
    """A seed's sets, as far as they can be drawn; what is finished must fit to them."""
    for method in methods:
        stages.load_result_if_finished(ctx, seed, method)
    return stages.draw_sets(ctx, seed)


def _build_context(config, workdir, reporter, stage) -> RunContext:
    found = results.load_all_results(workdir)
    expected = found[0]["fingerprint"] if found else None
    if is_primary():
        loaded = data.load(config.data, workdir, stage.report_progress, expected)
    barrier("data")
    if not is_primary():
        loaded = data.load_prepared(config.data, workdir)
    if loaded.edition == "sample":
        reporter.warn(
            f"SAMPLE EDITION for {config.name}: generated in the official format. Give "
            "the real files with --data-dir."
        )
    elif loaded.edition == "clipart":
        reporter.warn("CLIP ART: drawings that come with the package, not photographs")
    counts = ", ".join(f"{k} {v:,}" for k, v in loaded.counts.items() if v)
    reporter.log(f"{loaded.name}: {counts}")
    loaded, told = corruptions.apply(loaded, config.corruptions)
    if told:
        reporter.log(f"corruptions: {json.dumps(told)}")
    executor = EXECUTORS[config.run.executor]()
    model = models.build(
        config.model,
        classes=len(loaded.classes),
        vocabulary=loaded.vocabulary,
        image_size=config.data.image_size,
        text_length=config.data.text_length,
    )
    return RunContext(
        config=config,
        workdir=workdir,
        reporter=reporter,
        executor=executor,
        data=loaded,
        corruptions=told,
        model=model,
        forward=Forward(model, executor, config.run.evaluate_batch),
        loop=Loop(config.run, executor, reporter.warn),
        table=_table(config, loaded, executor),
    )


def _table(config, loaded, executor):
    """All rows: on the devices, the pictures too unless they are too large for that."""
    names = ("text", "labels", "has_image", "has_text")
    table = {name: np.asarray(getattr(loaded, name)) for name in names}
    image = HostColumn(loaded.image, loaded.has_image)
    kept = config.run.image_placement
    if kept == "auto":
        kept = "device" if fits(loaded.image.nbytes) else "host"
    if kept == "host":
        return executor.replicate(table) | {"image": image}
    rows = np.arange(len(loaded.id))
    return executor.replicate(table | {"image": image.take(rows)})


def _check_purged(ctx: RunContext, methods):
    """Refuse to go on with pictures that are not there any more."""
    for seed in ctx.config.seeds if ctx.data.purged else ():
        for method in methods:
            if stages.load_result_if_finished(ctx, seed, method) is None:
                raise UserError(
                    f"the pictures to forget were purged from {ctx.workdir}: what is "
                    f"finished can be shown, but {method} of seed {seed} cannot be "
                    "run; give another --workdir"
                )
