"""Measures PyTorch beside JAX: same architecture, parameters, rows, batch, precision.

PyTorch has a process of its own, which waits while JAX is measured and the other way
round, so that neither library's threads are in the other's way.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from ccu_jax.config.schema import to_json
from ccu_jax.errors import UserError

MODES = ("eager", "compile")
KINDS = ("original", "neggrad_plus", "ccu_plus")
_PLANNED = 32  # steps of training that are handed over: more are not measured


def missing() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if jax.devices()[0].platform not in ("cpu", "gpu"):
        return "torch is not asked for this kind of device"
    return None


def write(folder: pathlib.Path, problem, sizes: dict[str, int], programs) -> None:
    """Hands a problem over.

    Args:
        folder: where to.
        problem: with a store.
        sizes: `classes`, `vocabulary`, `image_size`, `text_length`.
        programs: `{kind: (Program, rows of each part or None)}`; rows are numbers in
            the table, which plans of ccu_plus count in.
    """
    about = {
        "config": to_json(problem.config),
        "multi_label": problem.multi_label,
        "sizes": sizes,
        "device": "cpu" if jax.devices()[0].platform == "cpu" else "cuda",
    }
    arrays = {f"params/{k}": x for k, x in flat(problem.params).items()}
    arrays |= {f"table/{k}": x for k, x in problem.table.items()}
    for kind, (program, rows) in programs.items():
        for part, plan in program.plan.items():
            most = len(plan) if rows else _PLANNED
            arrays[f"plan/{kind}/{part}"] = plan[:most]
        arrays |= {f"rows/{part}": x for part, x in (rows or {}).items()}
        if rows:
            arrays |= {f"store/{k}": x for k, x in problem.store.columns.items()}
    arrays = {name: _plain(x) for name, x in arrays.items()}
    np.savez(folder / "arrays.npz", **arrays)
    (folder / "about.json").write_text(json.dumps(about), "utf-8")


def _plain(x):
    x = np.asarray(x)
    # numpy's files know no bfloat16; the store keeps features as they were computed.
    return x.astype(np.float32) if x.dtype.kind == "V" or x.dtype == "bfloat16" else x


def flat(params) -> dict[str, np.ndarray]:
    """A parameter tree by the names `part/module/.../leaf`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(x) for path, x in leaves}


class Torch:
    """The process, from `write` on; `close` ends it."""

    def __init__(self, folder: pathlib.Path):  # noqa: D107
        self._folder = folder
        self._errors = (folder / "errors.txt").open("w", encoding="utf-8")
        threads = _threads()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            # No helpers of the compiler that live on beside what is measured.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ccu_jax.benchmarks.torch_child",
                folder,
                str(threads),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def close(self) -> None:
        """Ends the process: with its last request answered there is nothing to do."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def logits(self, rows: int) -> dict[str, np.ndarray]:
        """What it says of the first rows: logits of each view, embeddings."""
        told = self._ask(what="logits", rows=rows)
        if "failed" in told:
            raise UserError(f"PyTorch's model does not run: {told['failed']}")
        with np.load(self._folder / "logits.npz") as file:
            return dict(file)

    def window(self, kind: str, mode: str, steps: int, total: int) -> dict[str, Any]:
        """Seconds `start` and `steps` of so many of `total` steps, or `failed`: why."""
        return self._ask(
            what="window",
            kind=kind,
            compiled=mode == "compile",
            steps=steps,
            total=total,
        )

    def _ask(self, **what):
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            told = (self._folder / "errors.txt").read_text("utf-8").strip()
            why = told.splitlines()[-1] if told else "it ended without a word"
            raise UserError(f"the process of PyTorch ended: {why}; try --no-torch")
        return json.loads(answer)


def _threads() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not every system tells
        return os.cpu_count() or 1
