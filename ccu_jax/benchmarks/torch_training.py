"""The training and NegGrad+ steps in PyTorch, for a process without JAX.

They match `models/augmentation.py`, `methods/reference.py` and `methods/finetuning.py`.
`steps.start_torch` starts the process that calls them.

Letters: B rows, T tokens, S side of an image, K classes.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ccu_jax.benchmarks.torch_model import Params, Rows, apply
from ccu_jax.config import Config, Train

Batch = dict[str, Rows]  # keyed by part of the batch, such as "retain"
_MULTI_LABEL_SCALE = 4.0  # as in objectives.py
_UNKNOWN = 1  # token id of a dropped word
_TEXT_MODULES = ("text", "text_projection", "text_head")


class Inputs(NamedTuple):
    """Parameters, data and settings of the training steps, on the device."""

    config: Config  # `tail_blocks` and `label_smoothing` are ignored
    multi_label: bool
    params: Params  # by path
    table: Rows  # columns by name; images uint8 `[N, 3, S, S]`
    plans: dict[str, Rows]  # row numbers `[steps, B]` by method and part of the batch
    num_steps: dict[str, int]  # of a whole run by method, for the learning rate


_INPUTS: list[Inputs] = []  # of this process; at most one


def set_inputs(arrays: dict[str, Any]) -> None:
    """Loads the inputs that the functions of this process use."""
    _INPUTS[:] = [load_inputs(arrays)]


def load_inputs(arrays: dict[str, Any]) -> Inputs:
    """Converts the result of `steps.make_torch_inputs` to tensors on the device."""
    inputs = dict(arrays)
    device = torch.device(inputs.pop("device"))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, JAX's default

    def to_device(arrays: dict[str, np.ndarray]) -> Rows:
        return {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}

    params, table = to_device(inputs.pop("params")), to_device(inputs.pop("table"))
    for name, x in params.items():
        params[name] = x.T.contiguous() if name.endswith("/kernel") else x
    table["image"] = table["image"].permute(0, 3, 1, 2).contiguous()
    plans = {name: to_device(plan) for name, plan in inputs.pop("plans").items()}
    return Inputs(params=params, table=table, plans=plans, **inputs)


def augment(rows: Rows, train: Train) -> Rows:
    """Augments images and texts; modality dropout hides one of them from fusion."""
    text, has_image, has_text = rows["text"], rows["has_image"], rows["has_text"]
    words = torch.rand(text.shape, device=text.device)
    draw = torch.rand(len(text), 10, device=text.device)
    is_dropped = (words < train.word_dropout) & (text > _UNKNOWN)
    is_hidden = (draw[:, 8] < train.modality_dropout) & has_image & has_text
    hides_image = draw[:, 9] < 0.5
    return {
        **rows,
        "image": augment_images(rows["image"] / 255.0, draw, train),
        "text": text.masked_fill(is_dropped, _UNKNOWN),
        "has_image": has_image & ~(is_hidden & hides_image),
        "has_text": has_text & ~(is_hidden & ~hides_image),
        "image_weight": has_image.float(),
        "text_weight": has_text.float(),
    }


def augment_images(image: Tensor, draw: Tensor, train: Train) -> Tensor:
    """Shifts, stretches, flips and tints images `[B, 3, S, S]`.

    `draw` has uniform random numbers in [0, 1), at least 8 per row.
    """
    signed = 2 * draw - 1
    # Source coordinates; -1 and 1 are the outermost pixels.
    side, half = image.shape[-1], (image.shape[-1] - 1) / 2
    offset = torch.arange(side, device=draw.device) - half
    zoom = torch.exp(signed[:, 0:2] * train.zoom)
    shift = signed[:, 2:4] * train.shift
    y, x = ((offset - shift[..., None]) / zoom[..., None] / half).unbind(1)
    if train.flip:
        x = torch.where(draw[:, 7:8] < 0.5, x.flip(1), x)
    x, y = x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)
    grid = torch.stack((x, y), dim=-1)
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=True)
    tint = 1 + train.tint * signed[:, 4:7, None, None]
    return (1 + (image - 1) * tint).clamp(0, 1)


def _weighted_mean(value: Tensor, weight: Tensor) -> Tensor:
    return (value * weight).sum() / weight.sum().clamp(min=1e-9)


def cross_entropy(logits: Tensor, target: Tensor, multi_label: bool) -> Tensor:
    """Returns the cross-entropy `[B]` against target probabilities `[B, K]`."""
    if multi_label:
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return _MULTI_LABEL_SCALE * each.mean(-1)
    return F.cross_entropy(logits, target, reduction="none")


def contrastive_loss(out: Rows, weight: Tensor, temperature: float) -> Tensor:
    """Returns the symmetric InfoNCE loss of image and text embeddings."""
    logits = out["z_image"] @ out["z_text"].T / temperature
    masked = torch.where(weight > 0, 0.0, -1e9)
    target = torch.arange(len(logits), device=logits.device)
    both = (logits + masked, logits.T + masked)
    losses = [F.cross_entropy(x, target, reduction="none") for x in both]
    return _weighted_mean(losses[0] + losses[1], weight) / 2


def task_loss(out: Rows, rows: Rows, train: Train, multi_label: bool) -> Tensor:
    """Returns the training loss of the outputs on augmented rows."""
    image, text = rows["image_weight"], rows["text_weight"]
    weights = {"image": image, "text": text, "fused": torch.maximum(image, text)}
    contrastive = contrastive_loss(out, image * text, train.temperature)
    loss = train.contrastive_weight * contrastive
    for view, weight in weights.items():
        each = cross_entropy(out[view], rows["labels"], multi_label)
        loss = loss + _weighted_mean(each, weight)
    return loss


def training_loss(p: Params, batch: Batch, config: Config, multi_label: bool) -> Tensor:
    """Returns the training loss of the original model on a batch."""
    rows = augment(batch["rows"], config.train)
    out = apply(p, rows, config.model, num_dropout=len(rows["text"]))
    return task_loss(out, rows, config.train, multi_label)


def neggrad_loss(p: Params, batch: Batch, config: Config, multi_label: bool) -> Tensor:
    """Returns the NegGrad+ loss (Kurmanji et al. 2023), with one pass for both sets."""
    section, retain = config.neggrad_plus, augment(batch["retain"], config.train)
    size = len(retain["text"])
    unlearn = {**batch["unlearn"], "image": batch["unlearn"]["image"] / 255.0}
    names = ("image", "text", "has_image", "has_text")
    both = {name: torch.cat([retain[name], unlearn[name]]) for name in names}
    out = apply(p, both, config.model, num_dropout=size)
    num_classes = out["image"].shape[1]
    chance = _MULTI_LABEL_SCALE * math.log(2) if multi_label else math.log(num_classes)
    ascent = torch.zeros((), device=out["image"].device)
    for view in ("image", "fused"):
        loss = cross_entropy(out[view][size:], unlearn["labels"], multi_label)
        loss = loss.clamp(max=section.loss_cap * chance)
        ascent = ascent + _weighted_mean(loss, unlearn["has_image"].float())
    out = {name: x[:size] for name, x in out.items()}
    retain_loss = task_loss(out, retain, config.train, multi_label)
    return section.retain_weight * retain_loss - (1 - section.retain_weight) * ascent


class Training:
    """Runs training or NegGrad+ steps; `params` are the current parameters."""

    def __init__(self, inputs: Inputs, name: str, is_compiled: bool):
        """Creates the optimizer for the method `name`: "original" or "neggrad_plus"."""
        train, self._inputs = inputs.config.train, inputs
        self._plan = inputs.plans[name]
        loss, section, warmup = neggrad_loss, inputs.config.neggrad_plus, 0
        total = inputs.num_steps[name]
        if name == "original":
            loss, section = training_loss, train
            warmup = min(round(train.warmup_fraction * total), total - 1)
        self._loss: Callable[..., Tensor] = torch.compile(loss) if is_compiled else loss
        self.params, groups = {}, {False: [], True: []}
        for key, x in inputs.params.items():
            self.params[key] = x.clone().requires_grad_()
            groups[key.split("/")[0] in _TEXT_MODULES].append(self.params[key])
        rate = section.learning_rate
        text_group = {"params": groups[True], "lr": rate * train.text_lr_scale}
        options = {"betas": (0.9, 0.98), "weight_decay": train.weight_decay}
        self._optimizer = torch.optim.AdamW(
            [{"params": groups[False]}, text_group], rate, fused=True, **options
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _learning_rate_factor(step, warmup, total)
        )

    def run(self, num_steps: int) -> None:
        """Runs training steps, cycling through the batch plan."""
        inputs, table = self._inputs, self._inputs.table
        for step in range(num_steps):
            batch = {
                part: {key: x[rows[step % len(rows)]] for key, x in table.items()}
                for part, rows in self._plan.items()
            }
            self._optimizer.zero_grad()
            loss = self._loss(self.params, batch, inputs.config, inputs.multi_label)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
            self._optimizer.step()
            self._schedule.step()


def _learning_rate_factor(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * min((step - warmup) / (total - warmup), 1))) / 2


@functools.cache
def _make_training(name: str, is_compiled: bool, num_threads: int) -> Training:
    # One per number of threads, because torch.compile specializes its code to it.
    return Training(_INPUTS[0], name, is_compiled)


def measure_step(name: str, mode: str, num_steps: int, max_threads: int) -> float:
    """Returns the mean seconds per step, in the mode "eager" or "compile".

    On a CPU, this is the faster of one thread and `max_threads`: small matrix products
    gain nothing from threads and slow down on a busy machine.
    """
    is_cuda = next(iter(_INPUTS[0].params.values())).is_cuda
    seconds = []
    for num_threads in (1,) if is_cuda else (1, max_threads):
        torch.set_num_threads(num_threads)
        training = _make_training(name, mode == "compile", num_threads)
        start = time.perf_counter()
        training.run(num_steps)
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / num_steps
