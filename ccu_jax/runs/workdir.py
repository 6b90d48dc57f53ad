"""The folder of a run: whose it is, what it forgets, and that this is gone.

One folder belongs to one configuration and one set of data.
"""

import contextlib
import json
import os
import pathlib
import time

import numpy as np

from ccu_jax.config.schema import differing_keys, to_json
from ccu_jax.data.readers.untrusted_files import is_within
from ccu_jax.distributed.hosts import (
    all_agree,
    barrier,
    is_primary,
    process_index_and_count,
)
from ccu_jax.errors import RetryableError, UserError
from ccu_jax.evaluate import predictions
from ccu_jax.runs import results as rows
from ccu_jax.runs.context import RunContext
from ccu_jax.storage.files import try_lock, write_atomically
from ccu_jax.storage.records import add_checksum, read_record
from ccu_jax.unlearn_sets import splits as unlearn_set

# What may differ between two runs on one folder: it changes nothing but rounding.
FREE = ("methods", "seeds", "run.")
_LEASE_S = 120.0  # so long a network's folder may keep the lock of a host that is lost


def reject_external_links(workdir, links: bool) -> None:
    """Refuses a folder in which this would write or remove what lies elsewhere.

    Args:
        workdir: the folder.
        links: whether it may hold links that lead out of it.

    Raises:
        UserError: it holds such a link.
    """
    out = _find_external_link(workdir) if is_primary() and not links else ""
    if not all_agree(out == ""):
        raise UserError(
            f"{out or f'in {workdir} there'} is a link out of the folder of the "
            "run, in which this would write and remove: put what it leads to in "
            "its place, or, where you have made it, give "
            "--set run.allow_external_links=True"
        )


@contextlib.contextmanager
def lock_workdir(workdir):
    """Keeps other runs out of the folder while the block runs; a kill opens it again.

    Raises:
        RetryableError: another one is at work in it.
    """
    with contextlib.ExitStack() as stack:
        told = try_lock(stack, workdir) if is_primary() else ""
        end = time.monotonic() + _LEASE_S
        # What was started again at once may meet what is left of itself.
        if told and process_index_and_count()[1] > 1:
            print(f"another run is at work in {workdir} ({told}): waiting", flush=True)
        while told and process_index_and_count()[1] > 1 and time.monotonic() < end:
            time.sleep(1)
            told = try_lock(stack, workdir)
        if not all_agree(told == ""):
            raise RetryableError(
                f"another run is at work in {workdir}{told and f' ({told})'}: wait for "
                "its end, or give another --workdir"
            )
        yield


def _find_external_link(workdir) -> str:
    """A link out of the folder, or nothing: who has made it may be a stranger."""
    for above, folders, files in os.walk(workdir):
        for name in (*folders, *files):
            path = os.path.join(above, name)
            if os.path.islink(path) and not is_within(path, workdir):
                return path
    return ""


def check_same_config(config, workdir):
    """Refuse a folder that another configuration has filled."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        different = differing_keys(read_record(path), to_json(config))
    except ValueError:
        raise UserError(
            f"{path}, which says what {workdir} was made with, is damaged: remove it, "
            "and give the very command that it was made with; or another --workdir"
        ) from None
    other = [key for key in different if not key.startswith(FREE)]
    if other:
        raise UserError(
            f"{workdir} was made with another configuration ({'; '.join(other[:3])}):"
            " give another --workdir, or remove the folder to start anew"
        )


def write_config(config, workdir, files):
    """Leave this configuration's mark, and the unlearn sets that are drawn by now."""
    barrier("claim")  # all processes have looked at what was there
    if is_primary():
        mine = add_checksum(to_json(config))
        path = workdir / "config.json"
        write_atomically(path, (json.dumps(mine, indent=1) + "\n").encode())
    write_if_changed(files)


def write_if_changed(files):
    """Write texts to files that are not there yet, or say something else."""
    barrier("keep")  # all processes have looked at what was there
    for path, text in files.items() if is_primary() else ():
        if not path.exists() or path.read_bytes() != text.encode():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, text.encode())


def unlearn_set_path(workdir, seed):
    """Where the ids of a seed's unlearn set are written down."""
    return workdir / "unlearn_sets" / f"{seed}.txt"


def unlearn_set_files(ctx: RunContext, seed, sets) -> dict[pathlib.Path, str]:
    """What is written down of a seed's unlearn set: its ids, and near-duplicates.

    Raises:
        UserError: another unlearn set is written down already.
    """
    if not len(sets.unlearn):  # not drawn yet
        return {}
    config = ctx.config.unlearn
    text = unlearn_set.format_unlearn_set(
        ctx.data, sets, seed, config.rule, config.duplicates
    )
    path = unlearn_set_path(ctx.workdir, seed)
    if path.exists() and path.read_bytes() != text.encode():
        unlearn_set.check_intact(path)
        raise UserError(
            f"the unlearn set is another one than in {path}: give another --workdir, "
            "or remove the folder to start anew"
        )
    return {path: text} | _near_duplicate_files(ctx, seed, sets)


def _near_duplicate_files(ctx: RunContext, seed, sets) -> dict[pathlib.Path, str]:
    """Tell which near-duplicates of forgotten pictures there are."""
    near = unlearn_set.near_duplicates(ctx.data, sets)
    if not any(map(len, near.values())):
        return {}
    path = ctx.workdir / "unlearn_sets" / f"{seed}-near-duplicates.tsv"
    told = ", ".join(f"{name} {len(found)}" for name, found in near.items())
    ctx.reporter.log(
        f"seed {seed}: near-duplicates of forgotten pictures by set: {told} "
        f"(those in unlearn are forgotten too); see {path}"
    )
    return {path: unlearn_set.format_near_duplicates(ctx.data, sets, near)}


def load_evaluated_sets(ctx: RunContext, seed) -> unlearn_set.Sets:
    """The sets on which a finished original was evaluated.

    Raises:
        UserError: its outputs cannot be read.
    """
    path = ctx.workdir / "outputs" / f"original-{seed}.npz"
    where = {name: row for row, name in enumerate(ctx.data.id.tolist())}
    try:
        found = predictions.load_predictions(path)
        row = np.array([where[name] for name in found.id.tolist()])
    except KeyError:
        raise UserError(
            f"{path} is missing or damaged: remove "
            f"{rows.result_path(ctx.workdir, seed, 'original')} to make it again"
        ) from None
    of = {name: np.sort(row[found.split == name]) for name in predictions.SPLITS}
    return unlearn_set.Sets(**of)
