"""Reads the results of a run for comparison, and finds finished files that changed."""

import hashlib
import json
import pathlib

import jax
import numpy as np

from ccu_jax.train import checkpoint

# A purge removes or changes these; a killed purge does so partly.
_PURGED = ("shadows/", "checkpoints/original-0/", "data/")
# Wall times, and properties of the start that do not change the result.
_IGNORED = {"seconds", "costs_s", "commit", "device", "versions", "sha256"}
_RECORDS = ("stages/*.json", "audits/*.json", "audit.json", "results.json")
_FILES = ("outputs/*.npz", "unlearn_sets/*", "config.json", "data/*.npy")
_FEATURES = "checkpoints/original-0/features/*"


def load_results(workdir: pathlib.Path) -> dict[str, object]:
    """Returns all results of a run by file name, without wall times."""
    readers = {
        **dict.fromkeys((*_FILES, _FEATURES), _sha256),
        **dict.fromkeys(_RECORDS, _read_record),
        "checkpoints/*/params": _read_parameter_digests,
    }
    results = {
        str(path.relative_to(workdir)): read(path)
        for pattern, read in readers.items()
        for path in workdir.glob(pattern)
    }
    for path in workdir.glob("purge.json"):
        report = json.loads(path.read_text("utf-8"))
        results[path.name] = {name: report[name] for name in ("num_images", "hits")}
    return results


def _read_parameter_digests(folder: pathlib.Path) -> dict[str, str]:
    """Returns the SHA-256 of each array restored from the newest checkpoint."""
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


def read_finished_files(workdir: pathlib.Path) -> dict[str, tuple[str, int]]:
    """Returns `{path: (SHA-256, modification time in ns)}` of all finished files."""
    # Files that are complete as soon as they have this name.
    patterns = ["audits/*.json", "shadows/*/*.npz", "shadows/*/*/0/**/*", "data/*"]
    patterns.append(_FEATURES)
    for stage in (path.stem for path in workdir.glob("stages/*.json")):
        patterns += [f"stages/{stage}.json", f"outputs/{stage}.npz"]
        patterns.append(f"checkpoints/{stage}/params/**/*")
    return {
        str(path.relative_to(workdir)): (_sha256(path), path.stat().st_mtime_ns)
        for pattern in patterns
        for path in workdir.glob(pattern)
        if path.is_file()
    }


def find_redone_files(workdir: pathlib.Path, before: dict[str, tuple[str, int]]):
    """Returns the finished files that changed since `before`, except by a purge."""
    after = read_finished_files(workdir)
    purged = _PURGED if (workdir / "purged.json").exists() else ()
    return [
        name
        for name, file in before.items()
        if after.get(name) != file and not name.startswith(purged)
    ]


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_record(path: pathlib.Path) -> object:
    def select(fields: dict[str, object]) -> dict[str, object]:
        return {name: x for name, x in fields.items() if name not in _IGNORED}

    return json.loads(path.read_text("utf-8"), object_hook=select)
