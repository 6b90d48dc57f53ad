"""PyTorch beside JAX: the same classifier, parameters, rows, batches and precision.

This side writes the inputs and asks; `torch_training` runs in a child process without
JAX, so that their thread pools do not compete.
"""

import importlib.util
import json
import os
import pathlib

import jax
import numpy as np

from ccu_jax import methods, models
from ccu_jax.benchmarks.harness import Child
from ccu_jax.benchmarks.problems import Sizes
from ccu_jax.config.schema import to_json
from ccu_jax.errors import UserError
from ccu_jax.methods import Problem

METHODS = ("original", "neggrad_plus")
_MAX_PLANNED = 32  # training steps handed over; windows repeat them


def missing_torch() -> str | None:
    """Returns why PyTorch cannot be measured here, or None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    if jax.devices()[0].platform not in ("cpu", "gpu"):
        return "not measured on this kind of device"
    return None


def write_inputs(
    folder: pathlib.Path, problem: Problem, sizes: Sizes, names: list[str]
) -> None:
    """Writes what the child process reads.

    Args:
        folder: receives `about.json` and `arrays.npz`.
        problem: its configuration, parameters and table.
        sizes: of the classifier.
        names: methods, out of METHODS.
    """
    total_steps = {}
    arrays = {f"params/{k}": x for k, x in flatten_params(problem.params).items()}
    arrays |= {f"table/{k}": np.asarray(x) for k, x in problem.table.items()}
    for name in names:
        program = methods.METHODS[name](problem._replace(method=name))
        total_steps[name] = program.steps
        for part, plan in (program.plan or {}).items():
            arrays[f"plan/{name}/{part}"] = plan[:_MAX_PLANNED]
    about = {
        "config": to_json(problem.config),
        "multi_label": problem.multi_label,
        "sizes": {
            "classes": sizes.classes,
            "vocabulary": sizes.vocabulary,
            "image_size": sizes.image_size,
            "text_length": sizes.text_length,
        },
        "total_steps": total_steps,
        "device": "cpu" if jax.devices()[0].platform == "cpu" else "cuda",
    }
    with (folder / "arrays.npz").open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    (folder / "about.json").write_text(json.dumps(about), "utf-8")


def flatten_params(params: models.Params) -> dict[str, np.ndarray]:
    """Returns the parameters by the path of their leaf, `module/.../leaf`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(x) for path, x in leaves}


class TorchProcess:
    """The child process that runs PyTorch.

    Args:
        folder: where `write_inputs` has written.
    """

    def __init__(self, folder: pathlib.Path):
        """Starts the process and waits until it has loaded the model."""
        self._folder = folder
        threads = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            threads = len(os.sched_getaffinity(0))
        spec = {"folder": str(folder), "threads": threads}
        environment = {
            "OMP_NUM_THREADS": str(threads),
            # Compiler workers would go on beside the measurement.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        module = "ccu_jax.benchmarks.torch_training"
        self._child = Child("PyTorch", module, spec, folder, environment)
        self._child.answer()

    def close(self) -> None:
        """Ends the process."""
        self._child.close()

    def logits(self, rows: int) -> dict[str, np.ndarray]:
        """Returns logits [rows, K] and embeddings [rows, D] of the first rows."""
        answer = self._child.ask(what="logits", rows=rows)
        if "failed" in answer:
            raise UserError(f"PyTorch: the model fails: {answer['failed']}")
        with np.load(self._folder / "logits.npz") as file:
            return dict(file)

    def try_window(self, name: str, mode: str, steps: int) -> str | None:
        """Compiles and runs a window; returns the error if it fails."""
        return self._ask_window(name, mode, steps).get("failed")

    def window(self, name: str, mode: str, steps: int) -> float:
        """Returns the seconds of a step.

        Raises:
            UserError: the window fails.
        """
        answer = self._ask_window(name, mode, steps)
        if "failed" in answer:
            raise UserError(f"PyTorch, {name}: {answer['failed']}; try --no-torch")
        return answer["seconds"] / steps

    def _ask_window(self, name: str, mode: str, steps: int) -> dict:
        return self._child.ask(
            what="window", name=name, is_compiled=mode == "compile", steps=steps
        )
