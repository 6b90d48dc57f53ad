"""Removes the unlearned images from a working folder and searches for what is left.

Besides the images, `purge_workdir` removes the stored features of their rows and all
models that were trained on them.
"""

import json
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
from ccu_jax.storage.files import write_atomically
from ccu_jax.train import checkpoint
from ccu_jax.unlearn_sets.splits import load_all_ids


def purge_workdir(ctx: RunContext) -> None:
    """Removes the images of all unlearn sets of this folder, then searches for them.

    Raises:
        UserError: an unlearn set is not recorded, something cannot be removed, or a
            copy of an image was found.
    """
    with ctx.reporter.stage("purge") as stage:
        report = run_on_primary(
            lambda progress: _purge(ctx, progress), stage.report_progress
        )
    if report is None:
        return
    ctx.reporter.log(
        f"purged {report['num_images']:,} images; searched {report['num_files']:,} "
        f"files ({report['num_bytes']:,} bytes) for {report['num_patterns']:,} pieces "
        f"of them: {len(report['hits'])} found; too uniform to search for: "
        f"{report['num_uniform']}. Also removed: their rows in the feature stores of "
        f"the originals, and {report['models']} folders of models that were trained on "
        "them (originals, shadow models, diverged and interrupted runs). Kept: ids, "
        "scores, and the unchanged trunk in models of methods that do not train it. "
        "Your own files still hold the images"
    )
    if report["hits"]:
        raise UserError(
            f"purge: {len(report['hits'])} matches of unlearned images remain, such as "
            f"{report['hits'][0][0]}; see {ctx.workdir / 'purge.json'}. A retained row "
            "may have the same image; delete copies that other programs wrote and rerun"
        )


def _purge(ctx: RunContext, progress: Progress) -> dict[str, Any]:
    """Removes and searches; returns what is written to `purge.json`."""
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
    text = json.dumps(report, indent=1) + "\n"
    write_atomically(workdir / "purge.json", text.encode())
    return report


def _purge_models(workdir: pathlib.Path) -> int:
    """Removes all models that were trained on the images; returns how many folders."""
    saved = list(workdir.glob("checkpoints/*/params"))
    diverged = {
        f"{result['method']}-{result['seed']}"
        for result in load_all_results(workdir)
        if result.get("diverged")
    }
    candidates = [
        *workdir.glob("checkpoints/original-*/params"),
        # A diverged method keeps the original's parameters, or half-unlearned ones.
        *(path for path in saved if path.parent.name in diverged),
        # Interrupted before its result was written, and not run again.
        *(p for p in saved if not (workdir / f"stages/{p.parent.name}.json").exists()),
        *workdir.glob("checkpoints/*/steps*"),
        *workdir.glob("audits/*-steps"),
        *(path for path in workdir.glob("variants/*") if path.is_dir()),
        *(path for path in workdir.glob("tested/*") if path.is_dir()),
        *workdir.glob("shadows"),
    ]
    folders = {folder for folder in candidates if folder.exists()}
    # Compare while there is something to compare with: a kept model must not be a copy
    # of a removed one.
    digests = [d for folder in folders if (d := checkpoint.stored_digests(folder))]
    for folder in saved:
        if folder not in folders and checkpoint.stored_digests(folder) in digests:
            raise UserError(
                f"purge: {folder} holds a copy of a model that was trained on the "
                "images: remove this folder"
            )
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            raise UserError(f"purge: {folder} cannot be removed: remove it yourself")
    return len(folders)


def _purge_features(ctx: RunContext, ids: set[str]) -> int:
    """Removes rows from the originals' feature stores; returns how many in total."""
    rows = np.flatnonzero(np.isin(ctx.data.id, sorted(ids)))
    num_removed = 0
    # Not only of the finished seeds: an interrupted one may have begun a store.
    for original in sorted((ctx.workdir / "checkpoints").glob("original-*")):
        folder = original / "features"
        num_removed += feature_store.remove_rows(folder, rows)
        if feature_store.count_remaining(folder, rows):
            raise UserError(
                f"purge: {folder} still holds features of the unlearned images: remove "
                "this folder"
            )
    return num_removed
