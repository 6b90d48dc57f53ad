"""Whether two working folders hold the same results, and which files were redone."""

import hashlib
import json
import pathlib

import jax
import numpy as np

from ccu_jax.train import checkpoint

# What a purge removes or changes, possibly half of it when it is killed.
_PURGED = ("shadows/", "checkpoints/original-0/", "data/")
# Wall times, and what belongs to the start and not to the result.
_IGNORED = {"seconds", "costs_s", "commit", "device", "versions", "sha256"}
_RECORDS = ("stages/*.json", "audits/*.json", "audit.json", "results.json")
_FILES = ("outputs/*.npz", "unlearn_sets/*", "config.json", "data/*.npy")
_FEATURES = "checkpoints/original-0/features/*"


def load_results(workdir: pathlib.Path) -> dict[str, object]:
    """Returns all results of a run by file name, without wall times."""

    def named(read, *patterns):
        paths = [path for pattern in patterns for path in workdir.glob(pattern)]
        return {str(path.relative_to(workdir)): read(path) for path in paths}

    results = named(_sha256, *_FILES, _FEATURES) | named(_read_record, *_RECORDS)
    results |= named(parameter_digests, "checkpoints/*/params")
    for path in workdir.glob("purge.json"):
        report = json.loads(path.read_text("utf-8"))
        results[path.name] = {name: report[name] for name in ("num_images", "hits")}
    return results


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Returns the names of results that differ, or that only one of them has."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def parameter_digests(folder: pathlib.Path) -> dict[str, str]:
    """Returns the SHA-256 of each array of the newest checkpoint, as it is restored."""
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    meta = (folder / str(max(steps)) / "meta" / "metadata").read_text("utf-8")
    like = {
        name: jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"])
        for name, x in json.loads(meta)["arrays"].items()
    }
    warnings: list[str] = []
    saved = checkpoint.restore(folder, like, warnings.append)
    assert saved is not None and not warnings, (folder, warnings)
    arrays: dict[str, np.ndarray] = saved.tree
    return {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in arrays.items()}


def finished_files(workdir: pathlib.Path) -> dict[str, tuple[str, int]]:
    """Returns all files of finished work, with digest and modification time."""
    paths = []
    for path in sorted((workdir / "stages").glob("*.json")):
        folder = workdir / "checkpoints" / path.stem / "params"
        paths += [path, workdir / "outputs" / f"{path.stem}.npz", *folder.rglob("*")]
    # Files that are complete as soon as they have this name.
    for pattern in ("audits/*.json", "shadows/*/*.npz", "data/*", _FEATURES):
        paths += workdir.glob(pattern)
    for folder in workdir.glob("shadows/*/*/0"):
        paths += folder.rglob("*")
    return {
        str(path.relative_to(workdir)): (_sha256(path), path.stat().st_mtime_ns)
        for path in paths
        if path.is_file()
    }


def redone_files(workdir: pathlib.Path, before: dict[str, tuple[str, int]]):
    """Returns finished files that have changed, except those that a purge removes."""
    after = finished_files(workdir)
    purged = _PURGED if (workdir / "purged.json").exists() else ()
    return [
        name
        for name, file in before.items()
        if after.get(name) != file and not name.startswith(purged)
    ]


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_record(path: pathlib.Path):
    return _without_ignored(json.loads(path.read_text("utf-8")))


def _without_ignored(value):
    if isinstance(value, dict):
        return {k: _without_ignored(v) for k, v in value.items() if k not in _IGNORED}
    if isinstance(value, list):
        return [_without_ignored(v) for v in value]
    return value
