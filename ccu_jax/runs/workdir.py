"""The working folder of a run: its lock, configuration and unlearn sets.

A folder belongs to one configuration and one data set.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator

import numpy as np

from ccu_jax.config.schema import Config, differing_keys, to_json
from ccu_jax.data.readers.untrusted_files import is_within
from ccu_jax.distributed import hosts
from ccu_jax.distributed.hosts import process_index_and_count
from ccu_jax.errors import RetryableError, UserError
from ccu_jax.evaluate.predictions import SPLITS, load_predictions
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.results import outputs_path, result_path
from ccu_jax.storage.files import try_lock, write_atomically, write_json
from ccu_jax.storage.records import add_checksum, read_record
from ccu_jax.unlearn_sets import splits
from ccu_jax.unlearn_sets.splits import Sets

# Keys that may differ between runs in one folder: results agree up to rounding.
_FREE_KEYS = ("methods", "seeds", "run.")
# How long a network file system may keep the lock of a lost host.
_LEASE_S = 120.0


def reject_external_links(workdir: pathlib.Path, allow_links: bool) -> None:
    """Raises UserError if the folder contains a symbolic link that leads out of it."""
    paths = (
        os.path.join(parent, name)
        for parent, folders, files in os.walk(workdir)
        for name in (*folders, *files)
    )
    links = (p for p in paths if os.path.islink(p) and not is_within(p, workdir))
    link = next(links, "") if hosts.is_primary() and not allow_links else ""
    if not hosts.all_agree(link == ""):
        raise UserError(
            f"{link or workdir}: symbolic link out of the working folder, through "
            "which a run could write or remove files; replace it with its target, or, "
            "if you trust it, pass --set run.allow_external_links=True"
        )


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Locks the folder inside the block; raises RetryableError if another run has."""
    with contextlib.ExitStack() as stack:
        owner = try_lock(stack, workdir) if hosts.is_primary() else ""
        # After a restart of all hosts, a lost host may still have the lock.
        if owner and process_index_and_count()[1] > 1:
            print(f"{workdir}: locked by another run ({owner}); waiting", flush=True)
            end_s = time.monotonic() + _LEASE_S
            while owner and time.monotonic() < end_s:
                time.sleep(1)
                owner = try_lock(stack, workdir)
        if not hosts.all_agree(owner == ""):
            raise RetryableError(
                f"{workdir}: locked by another run{owner and f' ({owner})'}; wait "
                "until it ends, or use another --workdir"
            )
        yield


def check_same_config(config: Config, workdir: pathlib.Path) -> None:
    """Raises UserError if the folder belongs to another configuration."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        keys = differing_keys(read_record(path), to_json(config))
    except ValueError:
        raise UserError(
            f"{path}: damaged; remove it and rerun the first command of this folder, "
            "or use another --workdir"
        ) from None
    if keys := [key for key in keys if not key.startswith(_FREE_KEYS)]:
        raise UserError(
            f"{workdir}: belongs to another configuration ({', '.join(keys[:3])} "
            "differ); use another --workdir, or remove the folder to start over"
        )


def write_config(config: Config, workdir: pathlib.Path) -> None:
    """Writes config.json, which ties the folder to this configuration."""
    hosts.barrier("config.json compared")  # by all processes
    if hosts.is_primary():
        write_json(workdir / "config.json", add_checksum(to_json(config)))


def write_if_changed(texts: dict[pathlib.Path, str]) -> None:
    """Writes each text to its file, unless the file already has this content."""
    hosts.barrier("unlearn sets compared")  # by all processes
    for path, text in texts.items() if hosts.is_primary() else ():
        if not path.exists() or path.read_bytes() != text.encode():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, text.encode())


def unlearn_set_path(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """Returns the path of the file that lists the ids of a seed's unlearn set."""
    return workdir / "unlearn_sets" / f"{seed}.txt"


def unlearn_set_files(
    ctx: RunContext, seed: int, sets: Sets
) -> dict[pathlib.Path, str]:
    """Returns `{path: text}` that lists a seed's unlearn set and its near-duplicates.

    Raises UserError if the existing file is damaged or lists another unlearn set.
    """
    if not len(sets.unlearn):  # drawn after the original is trained
        return {}
    config = ctx.config.unlearn
    text = splits.format_unlearn_set(
        ctx.data, sets, seed, config.rule, config.duplicates
    )
    path = unlearn_set_path(ctx.workdir, seed)
    if path.exists() and path.read_bytes() != text.encode():
        splits.check_intact(path)
        raise UserError(
            f"{path}: differs from the unlearn set of this configuration; use "
            f"another --workdir, or remove {ctx.workdir} to start over"
        )
    texts = {path: text}
    duplicates = splits.find_near_duplicates(ctx.data, sets)
    if any(map(len, duplicates.values())):
        path = path.with_name(f"{seed}-near-duplicates.tsv")
        texts[path] = splits.format_near_duplicates(ctx.data, sets, duplicates)
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in duplicates.items())
        ctx.reporter.log(
            f"seed {seed}: near-duplicates of unlearned images by set: {counts} (those "
            f"in unlearn are unlearned too); see {path}"
        )
    return texts


def load_evaluated_sets(ctx: RunContext, seed: int) -> Sets:
    """Returns the sets that a finished original was evaluated on.

    Raises UserError if its predictions are missing or damaged.
    """
    path = outputs_path(ctx.workdir, seed, "original")
    row_by_id = {id_: row for row, id_ in enumerate(ctx.data.id.tolist())}
    predicted = load_predictions(path)
    try:
        rows = np.array([row_by_id[id_] for id_ in predicted.id.tolist()])
    except KeyError:
        raise UserError(
            f"{path}: missing or damaged; remove "
            f"{result_path(ctx.workdir, seed, 'original')} and rerun the same command"
        ) from None
    return Sets(**{name: np.sort(rows[predicted.split == name]) for name in SPLITS})
