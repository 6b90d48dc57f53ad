"""The training step and the step of NegGrad+ in plain PyTorch, in a child process.

The losses of `methods/reference.py` and `methods/finetuning.py`, the augmentation of
`models/augmentation.py`. Never imports JAX; `torch_baseline` is the other side. B rows,
S image side, T tokens, K classes.
"""

import copy
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ccu_jax.benchmarks.harness import serve
from ccu_jax.benchmarks.torch_model import Classifier, load_params
from ccu_jax.config import Config, NegGradPlus, Train
from ccu_jax.config.schema import from_json

UNKNOWN = 1  # the token id of a dropped word
MULTI_LABEL_SCALE = 4.0  # as in ccu_jax.objectives
_TEXT_MODULES = ("text", "text_projection", "text_head")
_IMAGE_DRAWS, _HIDE_DRAWS = 8, 2
Rows = dict[str, Tensor]


class Inputs(NamedTuple):
    """What `torch_baseline.write_inputs` has written, on the device.

    Attributes:
        config: of the run.
        multi_label: whether a row has several labels.
        device: "cpu" or "cuda".
        table: columns by name; images uint8 [N, 3, S, S].
        plans: row indices [steps, B] by method and part of the batch.
        total_steps: of a whole run, for the learning rate schedule.
    """

    config: Config
    multi_label: bool
    device: torch.device
    table: Rows
    plans: dict[str, Rows]
    total_steps: dict[str, int]


def read_inputs(folder: pathlib.Path) -> tuple[Inputs, Classifier]:
    """Reads the inputs, and the classifier with its parameters."""
    about = json.loads((folder / "about.json").read_text("utf-8"))
    with np.load(folder / "arrays.npz") as file:
        arrays = dict(file)
    device = torch.device(about["device"])

    def select(prefix: str) -> dict[str, np.ndarray]:
        return {
            name.removeprefix(prefix): x
            for name, x in arrays.items()
            if name.startswith(prefix)
        }

    table = {name: torch.from_numpy(x) for name, x in select("table/").items()}
    table["image"] = table["image"].permute(0, 3, 1, 2).contiguous()
    plans: dict[str, Rows] = {}
    for name, x in select("plan/").items():
        method, part = name.split("/")
        plan = torch.from_numpy(x.astype(np.int64)).to(device)
        plans.setdefault(method, {})[part] = plan
    inputs = Inputs(
        config=from_json(about["config"]),
        multi_label=about["multi_label"],
        device=device,
        table={name: x.to(device) for name, x in table.items()},
        plans=plans,
        total_steps=about["total_steps"],
    )
    model = Classifier(inputs.config.model, **about["sizes"])
    load_params(model, select("params/"))
    return inputs, model.to(device)


@torch.no_grad()
def compute_logits(inputs: Inputs, model: Classifier, rows: int) -> dict:
    """Returns logits [rows, K] and embeddings of the first rows, without dropout."""
    table = {name: x[:rows] for name, x in inputs.table.items()}
    h = model.encode_image(table["image"] / 255.0), model.encode_text(table["text"])
    out = model.heads(*h, table["has_image"], table["has_text"])
    return {name: x.float().cpu().numpy() for name, x in out.items()}


# --- augmentation ---------------------------------------------------------------------


def augment(rows: Rows, draw: Tensor, train: Train) -> Rows:
    """Augments images and texts and hides modalities from the fused head.

    Args:
        rows: `image` uint8 [B, 3, S, S], `text` [B, T], `has_image`, `has_text`.
        draw: uniform random numbers in 0..1, [B, 10 + T].
        train: settings of the augmentation.
    """
    num_words = draw.shape[1] - _IMAGE_DRAWS - _HIDE_DRAWS
    image, hide, words = draw.split([_IMAGE_DRAWS, _HIDE_DRAWS, num_words], dim=1)
    text, has_image, has_text = rows["text"], rows["has_image"], rows["has_text"]
    is_dropped = (words < train.word_dropout) & (text > UNKNOWN)
    is_hidden = (hide[:, 0] < train.modality_dropout) & has_image & has_text
    hides_image = hide[:, 1] < 0.5
    return {
        **rows,
        "image": augment_images(rows["image"] / 255.0, image, train),
        "text": text.masked_fill(is_dropped, UNKNOWN),
        "has_image": has_image & ~(is_hidden & hides_image),
        "has_text": has_text & ~(is_hidden & ~hides_image),
        "image_weight": has_image.float(),
        "text_weight": has_text.float(),
    }


def augment_images(image: Tensor, draw: Tensor, train: Train) -> Tensor:
    """Shifts, stretches, flips and tints images [B, 3, S, S]."""
    signed = 2 * draw - 1
    if train.shift or train.zoom or train.flip:
        image = F.grid_sample(
            image,
            _sampling_grid(image.shape[-1], signed, draw, train),
            mode="bilinear",
            padding_mode="border",
            align_corners=True,
        )
    if train.tint:
        tint = 1 + train.tint * signed[:, 4:7, None, None]
        image = (1 + (image - 1) * tint).clamp(0, 1)
    return image


def _sampling_grid(side: int, signed: Tensor, draw: Tensor, train: Train) -> Tensor:
    """Returns source coordinates [B, S, S, 2]; -1 and 1 are the outermost pixels."""
    half = (side - 1) / 2
    at = torch.arange(side, device=draw.device) - half
    zoom = torch.exp(signed[:, 0:2] * train.zoom)
    shift = signed[:, 2:4] * train.shift
    source = (at - shift[..., None]) / zoom[..., None] / half  # [B, 2, S]: y, x
    y, x = source.unbind(1)
    if train.flip:
        x = torch.where(draw[:, 7:8] < 0.5, x.flip(1), x)
    grid = (x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side))
    return torch.stack(grid, dim=-1)


# --- losses ---------------------------------------------------------------------------


def _mean(value: Tensor, weight: Tensor) -> Tensor:
    return (value * weight).sum() / weight.sum().clamp(min=1e-9)


def cross_entropy(logits: Tensor, target: Tensor, multi_label: bool) -> Tensor:
    """Returns the cross-entropy [B] against target probabilities [B, K]."""
    if multi_label:
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return MULTI_LABEL_SCALE * each.mean(-1)
    return F.cross_entropy(logits, target, reduction="none")


def contrastive_loss(z_image, z_text, weight, temperature: float) -> Tensor:
    """Returns the symmetric InfoNCE loss of images and their texts."""
    logits = z_image @ z_text.T / temperature
    masked = torch.where(weight > 0, 0.0, -1e9)
    target = torch.arange(len(logits), device=logits.device)
    both = (logits + masked, logits.T + masked)
    losses = [F.cross_entropy(x, target, reduction="none") for x in both]
    return _mean(losses[0] + losses[1], weight) / 2


def task_loss(out, rows: Rows, train: Train, multi_label: bool) -> Tensor:
    """Returns the training loss of outputs on augmented rows."""
    image, text = rows["image_weight"], rows["text_weight"]
    weights = {"image": image, "text": text, "fused": torch.maximum(image, text)}
    target = rows["labels"]
    if train.label_smoothing:
        even = 0.5 if multi_label else 1 / target.shape[1]
        target = target + train.label_smoothing * (even - target)
    loss = train.contrastive_weight * contrastive_loss(
        out["z_image"], out["z_text"], image * text, train.temperature
    )
    for view, weight in weights.items():
        loss = loss + _mean(cross_entropy(out[view], target, multi_label), weight)
    return loss


def _drop_features(model: Classifier, h: Tensor, num_rows: int) -> Tensor:
    """Applies dropout to the features of the first rows."""
    if not model.dropout:
        return h
    return torch.cat([F.dropout(h[:num_rows], model.dropout), h[num_rows:]])


def training_loss(model, batch, draw, config: Config, multi_label: bool) -> Tensor:
    """Returns the loss that trains the original."""
    rows = augment(batch["rows"], draw, config.train)
    features = model.encode_image(rows["image"]), model.encode_text(rows["text"])
    h = [_drop_features(model, x, len(draw)) for x in features]
    out = model.heads(*h, rows["has_image"], rows["has_text"])
    return task_loss(out, rows, config.train, multi_label)


def neggrad_loss(model, batch, draw, config: Config, multi_label: bool) -> Tensor:
    """Returns the loss of NegGrad+ (Kurmanji et al. 2023), both sets in one pass."""
    section: NegGradPlus = config.neggrad_plus
    retain, count = augment(batch["retain"], draw, config.train), len(draw)
    unlearn = {**batch["unlearn"], "image": batch["unlearn"]["image"] / 255.0}
    names = ("image", "text", "has_image", "has_text")
    image, text, *has = (torch.cat([retain[name], unlearn[name]]) for name in names)
    features = model.encode_image(image), model.encode_text(text)
    h = [_drop_features(model, x, count) for x in features]
    out = model.heads(*h, *has)
    num_classes = out["image"].shape[1]
    chance = MULTI_LABEL_SCALE * math.log(2) if multi_label else math.log(num_classes)
    forget = torch.zeros((), device=draw.device)
    for view in ("image", "fused"):
        loss = cross_entropy(out[view][count:], unlearn["labels"], multi_label)
        loss = loss.clamp(max=section.loss_cap * chance)
        forget = forget + _mean(loss, unlearn["has_image"].float())
    out = {name: x[:count] for name, x in out.items()}
    keep = task_loss(out, retain, config.train, multi_label)
    return section.retain_weight * keep - (1 - section.retain_weight) * forget


# --- steps ----------------------------------------------------------------------------


class Training:
    """Steps of training or of NegGrad+ from the parameters of a model.

    Args:
        inputs: rows, plans and settings.
        model: is changed.
        name: "original" or "neggrad_plus".
        is_compiled: whether `torch.compile` compiles the loss.
    """

    def __init__(self, inputs: Inputs, model: Classifier, name: str, is_compiled: bool):
        """Makes the optimizer and its schedule."""
        train, self._inputs, self._model = inputs.config.train, inputs, model.train()
        self._plan, self._is_original = inputs.plans[name], name == "original"
        loss = training_loss if self._is_original else neggrad_loss
        self._loss: Callable[..., Tensor] = torch.compile(loss) if is_compiled else loss
        section = train if self._is_original else inputs.config.neggrad_plus
        total, warmup = inputs.total_steps[name], 0
        if self._is_original:
            warmup = min(round(train.warmup_fraction * total), total - 1)
        text = [x for m in _TEXT_MODULES for x in getattr(model, m).parameters()]
        text_ids = set(map(id, text))
        rest = [x for x in model.parameters() if id(x) not in text_ids]
        rate = section.learning_rate
        self._params = [*rest, *text]
        self._optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": text, "lr": rate * train.text_lr_scale}],
            lr=rate,
            betas=(0.9, 0.98),
            weight_decay=train.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _cosine(step, warmup, total)
        )

    def run(self, steps: int) -> None:
        """Makes `steps` steps; the plan repeats."""
        table, device = self._inputs.table, self._inputs.device
        num_draws = _IMAGE_DRAWS + _HIDE_DRAWS + table["text"].shape[1]
        for step in range(steps):
            batch = {
                part: {key: x[rows[step % len(rows)]] for key, x in table.items()}
                for part, rows in self._plan.items()
            }
            augmented = batch["rows" if self._is_original else "retain"]
            draw = torch.rand(len(augmented["text"]), num_draws, device=device)
            self._optimizer.zero_grad()
            config, multi_label = self._inputs.config, self._inputs.multi_label
            self._loss(self._model, batch, draw, config, multi_label).backward()
            torch.nn.utils.clip_grad_norm_(self._params, 1.0)
            self._optimizer.step()
            self._schedule.step()


def _cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * min((step - warmup) / (total - warmup), 1))) / 2


def _prepare(spec: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    folder = pathlib.Path(spec["folder"])
    inputs, model = read_inputs(folder)
    is_cuda = inputs.device.type == "cuda"
    if is_cuda:
        torch.set_float32_matmul_precision("high")  # TF32, JAX's default
    trainings: dict[tuple[str, bool, int], Training] = {}

    def run_window(name: str, is_compiled: bool, steps: int) -> dict[str, Any]:
        # Small products gain nothing from threads, and lose where the machine is busy.
        return {
            "seconds": min(
                time_steps(name, is_compiled, threads, steps)
                for threads in ((1, spec["threads"]) if not is_cuda else (1,))
            )
        }

    def time_steps(name: str, is_compiled: bool, threads: int, steps: int) -> float:
        torch.set_num_threads(threads)
        key = name, is_compiled, threads
        if key not in trainings:
            copied = copy.deepcopy(model)
            trainings[key] = Training(inputs, copied, name, is_compiled)
        start = time.perf_counter()
        trainings[key].run(steps)
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def answer(what: str, **request: Any) -> dict[str, Any]:
        try:
            if what == "logits":
                arrays = compute_logits(inputs, model, **request)
                np.savez(folder / "logits.npz", **arrays)
                return {}
            return run_window(**request)
        except Exception as error:  # torch.compile fails in many ways
            return {
                "failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            }

    return answer


if __name__ == "__main__":
    serve(_prepare)
