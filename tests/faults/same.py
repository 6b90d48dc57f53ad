"""Whether two working folders hold the same results, and what a restart left alone."""

import hashlib
import json
import pathlib

import jax
import numpy as np

# What a purge removes for good, or writes to: half of it, where it was killed.
_PURGED = ("shadows/", "checkpoints/original-0/", "data/")
# By clock, or of the start and not of the result.
_FREE = {"seconds", "costs_s", "commit", "device", "versions", "sha256"}
_RECORDS = ("stages/*.json", "audits/*.json", "audit.json", "results.json")


def results(workdir: pathlib.Path) -> dict[str, object]:
    """Everything that a run has come to, by the names of files; clocks left out."""
    found: dict[str, object] = {}
    for pattern in ("outputs/*.npz", "unlearn_sets/*", "config.json"):
        for path in sorted(workdir.glob(pattern)):
            found[str(path.relative_to(workdir))] = _digest(path)
    for pattern in _RECORDS:
        for path in sorted(workdir.glob(pattern)):
            read = json.loads(path.read_text("utf-8"))
            found[str(path.relative_to(workdir))] = _timeless(read)
    for path in sorted((workdir / "checkpoints").glob("*/params")):
        found[str(path.relative_to(workdir))] = parameters(path)
    store = workdir / "checkpoints" / "original-0" / "features"
    for path in sorted(store.iterdir()) if store.is_dir() else ():
        found[str(path.relative_to(workdir))] = _digest(path)
    for path in sorted((workdir / "data").glob("*.npy")):
        found[str(path.relative_to(workdir))] = _digest(path)
    if (workdir / "purge.json").exists():
        told = json.loads((workdir / "purge.json").read_text("utf-8"))
        found["purge.json"] = {name: told[name] for name in ("pictures", "hits")}
    return found


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """The names of what differs, or is in one of them only."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def parameters(folder: pathlib.Path) -> dict[str, str]:
    """Digests of the arrays of the newest checkpoint."""
    named = arrays(folder)
    return {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in named.items()}


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of the newest checkpoint, read as a run reads them."""
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    meta = (folder / str(max(steps)) / "meta" / "metadata").read_text("utf-8")
    about = json.loads(meta)["arrays"]
    from ccu_jax.train import checkpoint

    like = {
        name: jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"])
        for name, x in about.items()
    }
    complaints: list[str] = []
    saved = checkpoint.restore(folder, like, complaints.append)
    assert saved is not None and not complaints, (folder, complaints)
    return saved.tree


def finished(workdir: pathlib.Path) -> dict[str, tuple[str, int]]:
    """All files of finished work, with a digest of the content and the time."""
    found = []
    for path in sorted((workdir / "stages").glob("*.json")):
        folder = workdir / "checkpoints" / path.stem / "params"
        found += [path, workdir / "outputs" / f"{path.stem}.npz", *folder.rglob("*")]
    found += (workdir / "audits").glob("*.json")
    found += (workdir / "shadows").glob("*/*.npz")
    # What is whole as soon as it has this name.
    found += (workdir / "data").glob("*")
    found += (workdir / "checkpoints" / "original-0" / "features").glob("*")
    for folder in (workdir / "shadows").glob("*/*/0"):
        found += folder.rglob("*")
    return {
        str(path.relative_to(workdir)): (_digest(path), path.stat().st_mtime_ns)
        for path in found
        if path.is_file()
    }


def redone(workdir: pathlib.Path, before: dict[str, tuple[str, int]]) -> list[str]:
    """What was finished before and is not the same file any more.

    What a purge has removed is not looked for.
    """
    after = finished(workdir)
    gone = _PURGED if (workdir / "purged.json").exists() else ()
    return [
        name
        for name, known in before.items()
        if after.get(name) != known and not name.startswith(gone)
    ]


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in _FREE}
    if isinstance(value, list):
        return [_timeless(v) for v in value]
    return value
