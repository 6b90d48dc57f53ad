"""Removes the unlearned images from a working folder and searches for copies of them.

Besides the images, `purge_workdir` removes the stored features of their rows and all
models that were trained on them.
"""

import functools
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from ccu_jax import data
from ccu_jax.distributed.hosts import Progress, run_on_primary
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.results import load_all_results
from ccu_jax.runs.workdir import unlearn_set_path
from ccu_jax.storage.files import write_json
from ccu_jax.train import checkpoint
from ccu_jax.unlearn_sets.splits import load_all_ids


def purge_workdir(ctx: RunContext) -> None:
    """Removes the images of all unlearn sets of a run, then searches for copies.

    Raises:
        UserError: the file of an unlearn set is missing, something cannot be removed,
            or a copy of an image was found.
    """
    with ctx.reporter.stage("purge") as stage:
        run_on_primary(functools.partial(_purge, ctx), stage.report_progress)


def _purge(ctx: RunContext, progress: Progress) -> None:
    """Removes the images, searches for copies, and reports to screen and purge.json."""
    workdir = ctx.workdir
    recorded = {result["seed"] for result in load_all_results(workdir)}
    for seed in sorted({*ctx.config.seeds, *recorded}):
        if not (path := unlearn_set_path(workdir, seed)).exists():
            raise UserError(
                f"purge: missing {path}; rerun the same command with seed {seed} "
                "among its seeds to recreate it, then purge"
            )
    folder, duplicates = workdir / "unlearn_sets", ctx.config.unlearn.duplicates
    ids = load_all_ids(ctx.data, folder, duplicates)
    compile_cache = jax.config.values["jax_compilation_cache_dir"]
    folders = [workdir, *([pathlib.Path(compile_cache)] if compile_cache else [])]
    counts: dict[str, int] = {}

    def remove_derived() -> None:
        counts["features"] = _purge_features(ctx, ids)
        counts["models"] = _purge_models(workdir)

    result = data.purge_images(
        ctx.config.data, workdir, ids, folders, progress, remove_derived
    )
    report = result._asdict() | counts
    write_json(workdir / "purge.json", report)
    _report(ctx, report)


def _report(ctx: RunContext, report: dict[str, Any]) -> None:
    """Logs the result of a purge; raises UserError if copies were found."""
    ctx.reporter.log(
        f"purged {report['num_images']:,} images; searched {report['num_files']:,} "
        f"files ({report['num_bytes']:,} bytes) for {report['num_patterns']:,} pieces "
        f"of them: {len(report['hits'])} found; images too uniform to search for: "
        f"{report['num_uniform']}. Also removed: their rows in the feature stores of "
        f"the originals, and {report['models']} folders of models trained on them "
        "(originals, shadow models, diverged and interrupted runs). Kept: ids, scores, "
        "and the unchanged trunk in models of methods that do not train it. Your own "
        "files still contain the images"
    )
    if report["hits"]:
        raise UserError(
            f"purge: {len(report['hits'])} matches of unlearned images remain, such as "
            f"{report['hits'][0][0]}; see {ctx.workdir / 'purge.json'}. A retained row "
            "may have the same image; delete copies that other programs wrote and rerun"
        )


def _purge_models(workdir: pathlib.Path) -> int:
    """Removes all models trained on the images; returns the number of folders."""
    saved = list(workdir.glob("checkpoints/*/params"))
    divergences = {
        f"{result['method']}-{result['seed']}": result.get("diverged")
        for result in load_all_results(workdir)
    }
    folders = {
        *workdir.glob("checkpoints/original-*/params"),
        # Models without a result, which were interrupted, and diverged ones: they may
        # have the original's parameters, or half-unlearned ones.
        *(path for path in saved if divergences.get(path.parent.name, "interrupted")),
        *workdir.glob("checkpoints/*/steps*"),
        *workdir.glob("audits/*-steps"),
        *workdir.glob("variants/*/"),
        *workdir.glob("tested/*/"),
        *workdir.glob("shadows"),
    }
    # Compared before the removal: models that stay must not be copies of removed ones.
    digests = [d for folder in folders if (d := checkpoint.read_digests(folder))]
    for folder in saved:
        if folder not in folders and checkpoint.read_digests(folder) in digests:
            raise UserError(
                f"purge: {folder} contains a copy of a model trained on the images; "
                "remove this folder and rerun"
            )
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            raise UserError(f"purge: {folder} cannot be removed; delete it and rerun")
    return len(folders)


def _purge_features(ctx: RunContext, ids: set[str]) -> int:
    """Zeroes rows in the originals' feature stores; returns the number of rows."""
    rows = np.flatnonzero(np.isin(ctx.data.id, sorted(ids)))
    num_removed = 0
    # An interrupted seed may have begun a store as well.
    for original in sorted(ctx.workdir.glob("checkpoints/original-*")):
        folder = original / "features"
        num_removed += feature_store.erase_rows(folder, rows)
        if feature_store.count_nonzero_rows(folder, rows):
            raise UserError(
                f"purge: {folder} still contains features of the unlearned images; "
                "remove this folder and rerun"
            )
    return num_removed
