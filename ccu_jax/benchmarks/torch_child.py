"""The process in which PyTorch is measured: asked by lines of JSON, see `bench_torch`.

JAX is never imported here, so neither library's threads are in the other's way.
"""

import copy
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from ccu_jax.benchmarks.torch_model import Classifier, load
from ccu_jax.benchmarks.torch_plus import Plus
from ccu_jax.benchmarks.torch_train import Training
from ccu_jax.config.schema import Config, from_json


class World(NamedTuple):
    """What is measured on: the configuration, and rows on the device.

    `table`: columns, pictures as bytes [N, 3, S, S]; `store`: stored features on the
    host; `rows`: of each part of ccu_plus; `plans`: rows of each step by kind and part.
    """

    config: Config
    multi_label: bool
    device: torch.device
    table: dict[str, torch.Tensor]
    store: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    plans: dict[str, dict[str, torch.Tensor]]


def read(folder: pathlib.Path) -> tuple[World, Classifier]:
    """What `bench_torch.write` left: the world, and the model with its parameters."""
    about = json.loads((folder / "about.json").read_text("utf-8"))
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    device = torch.device(about["device"])

    def under(prefix):
        size = len(prefix) + 1
        return {n[size:]: x for n, x in arrays.items() if n.startswith(f"{prefix}/")}

    table = {name: torch.from_numpy(x) for name, x in under("table").items()}
    table["image"] = table["image"].permute(0, 3, 1, 2).contiguous()
    plans: dict[str, dict[str, torch.Tensor]] = {}
    for name, x in under("plan").items():
        kind, part = name.split("/")
        plan = torch.from_numpy(x.astype(np.int64)).to(device)
        plans.setdefault(kind, {})[part] = plan
    world = World(
        config=from_json(about["config"]),
        multi_label=about["multi_label"],
        device=device,
        table={name: x.to(device) for name, x in table.items()},
        store=under("store"),
        rows={name: x.astype(np.int64) for name, x in under("rows").items()},
        plans=plans,
    )
    model = Classifier(world.config.model, **about["sizes"])
    load(model, under("params"))
    return world, model.to(device)


@torch.no_grad()
def logits(world: World, model: Classifier, rows: int) -> dict[str, np.ndarray]:
    """Logits and embeddings of the first rows, without dropout."""
    table = {name: x[:rows] for name, x in world.table.items()}
    h = model.features(table["image"] / 255.0), model.read(table["text"])
    said = model.heads(*h, table["has_image"], table["has_text"])
    return {name: x.float().cpu().numpy() for name, x in said.items()}


class Runners:
    """What has been set up for each kind and mode, for the next window."""

    def __init__(self, world: World, model: Classifier, threads: int):  # noqa: D107
        self._world, self._model = world, model
        self._made: dict[tuple[str, bool], Any] = {}
        cpu = world.device.type == "cpu"
        self._threads = sorted({1, threads}) if cpu else [threads]
        self._faster: dict[str, int] = {}

    def window(self, kind: str, compiled: bool, steps: int, total: int):
        """Seconds of so many steps from the original, and of the start before them.

        On CPUs eager steps are measured with one thread and with one for each core, and
        the faster counts: small products gain nothing from threads, and where other
        programs run, threads that wait for each other lose five times what they gain.
        What is compiled is compiled for a number of threads: that which was the faster
        one when this was first asked.
        """
        if (kind, compiled) not in self._made:
            self._made[kind, compiled] = self._make(kind, compiled, total)
        runner = self._made[kind, compiled]
        if compiled:
            if kind not in self._faster:
                self.window(kind, False, steps, total)
            return self._timed(runner, kind, steps, self._faster[kind])
        found = [self._timed(runner, kind, steps, n) for n in self._threads]
        best = min(found, key=lambda told: told["start"] + told["steps"])
        self._faster.setdefault(kind, best["threads"])
        return best

    def _timed(self, runner, kind, steps, threads):
        torch.set_num_threads(threads)
        start_s = 0.0
        if kind == "ccu_plus":
            self._wait()
            began = time.perf_counter()
            runner.start()
            self._wait()
            start_s = time.perf_counter() - began
        began = time.perf_counter()
        runner.run(steps)
        self._wait()
        took = time.perf_counter() - began
        return {"start": start_s, "steps": took, "threads": threads}

    def _make(self, kind, compiled, total):
        world, plan = self._world, self._world.plans[kind]
        if kind == "ccu_plus":
            return Plus(world, self._model, plan, compiled)
        model = copy.deepcopy(self._model)
        return Training(world, model, kind, plan, total, compiled)

    def _wait(self):
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()


def serve(folder: pathlib.Path, threads: int, requests, replies) -> None:
    """Answers one line of JSON with another until there are no more."""
    world, model = read(folder)
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX does by default
    runners = Runners(world, model, threads)
    for line in requests:
        asked = json.loads(line)
        try:
            if asked.pop("what") == "logits":
                np.savez(folder / "logits.npz", **logits(world, model, **asked))
                told = {}
            else:
                told = runners.window(**asked)
        except Exception as error:  # what does not work here is told, not fatal
            told = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), file=replies, flush=True)


def main(argv: list[str]) -> int:
    """`FOLDER THREADS`: serves what `bench_torch.write` left there."""
    # The answers alone go to the pipe: compilers print what they like.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(pathlib.Path(argv[0]), int(argv[1]), sys.stdin, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
