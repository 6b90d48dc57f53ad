"""The training step and the step of NegGrad+ in plain PyTorch.

The losses of `methods/reference.py` and `methods/baselines.py`, the augmentation of
`augment.py`; pictures stay on the device as bytes, and a batch is gathered there.
"""

import math

import torch
import torch.nn.functional as F

from ccu_jax.benchmarks.torch_model import TEXT

UNKNOWN = 1  # the token id that a dropped word becomes
_PICTURE, _HIDE = 8, 2
MULTI_LABEL_SCALE = 4.0


def augment(rows, draw, config):
    """Changed pictures and words, and what fusion may look at.

    Args:
        rows: `image` uint8 [B, 3, S, S], `text`, `has_image`, `has_text`.
        draw: random numbers in 0..1, [B, `width_of(T)`].
        config: `config.Train`.
    """
    picture, hide, words = draw.split(
        [_PICTURE, _HIDE, draw.shape[1] - _PICTURE - _HIDE], dim=1
    )
    text, has_image, has_text = rows["text"], rows["has_image"], rows["has_text"]
    lost = (words < config.word_dropout) & (text > UNKNOWN)
    see, read = hidden(has_image, has_text, hide, config.modality_dropout)
    return {
        **rows,
        "image": pictures(rows["image"] / 255.0, picture, config),
        "text": text.masked_fill(lost, UNKNOWN),
        "has_image": see,
        "has_text": read,
        "image_weight": has_image.float(),
        "text_weight": has_text.float(),
    }


def width_of(length: int) -> int:
    """How many random numbers a row of so many words takes."""
    return _PICTURE + _HIDE + length


def hidden(has_image, has_text, draw, rate):
    """What fusion may look at: now and then one of two is hidden."""
    hide = (draw[:, 0] < rate) & has_image & has_text
    picture = draw[:, 1] < 0.5
    return has_image & ~(hide & picture), has_text & ~(hide & ~picture)


def pictures(image, draw, config):
    """Pictures [B, 3, S, S] shifted, stretched, flipped, tinted."""
    spread = 2 * draw - 1
    if config.shift or config.zoom or config.flip:
        image = F.grid_sample(
            image,
            _grid(image.shape[-1], spread, draw, config),
            mode="bilinear",
            padding_mode="border",
            align_corners=True,
        )
    if config.tint:
        tint = 1 + config.tint * spread[:, 4:7, None, None]
        image = (1 + (image - 1) * tint).clamp(0, 1)
    return image


def _grid(side, spread, draw, config):
    """Where each pixel comes from, [B, S, S, 2]; -1 and 1 are the outermost pixels."""
    half = (side - 1) / 2
    at = torch.arange(side, device=draw.device) - half
    zoom = torch.exp(spread[:, 0:2] * config.zoom)
    shift = spread[:, 2:4] * config.shift
    source = (at - shift[..., None]) / zoom[..., None] / half  # [B, 2, S]: y, x
    y, x = source.unbind(1)
    if config.flip:
        x = torch.where(draw[:, 7:8] < 0.5, x.flip(1), x)
    grid = (x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side))
    return torch.stack(grid, dim=-1)


# --- losses ---------------------------------------------------------------------------


def mean(value, weight):
    """Weighted mean of the rows; 0 where none counts."""
    return (value * weight).sum() / weight.sum().clamp(min=1e-9)


def cross_entropy_rows(logits, target, multi_label):
    """Cross-entropy of each row against target probabilities."""
    if multi_label:
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return MULTI_LABEL_SCALE * each.mean(-1)
    return F.cross_entropy(logits, target, reduction="none")


def alignment(z_image, z_text, weight, temperature):
    """Symmetric contrast of pictures and their texts."""
    logits = z_image @ z_text.T / temperature
    absent = torch.where(weight > 0, 0.0, -1e9)
    own = torch.arange(len(logits), device=logits.device)
    both = (logits + absent, logits.T + absent)
    rows = sum(F.cross_entropy(x, own, reduction="none") for x in both)
    return mean(rows, weight) / 2


def classification(out, rows, config, multi_label):
    """The task's loss of outputs on augmented rows."""
    see, read = rows["image_weight"], rows["text_weight"]
    weight = {"image": see, "text": read, "fused": torch.maximum(see, read)}
    target = rows["labels"]
    if config.label_smoothing:
        even = 0.5 if multi_label else 1 / target.shape[1]
        target = target + config.label_smoothing * (even - target)
    total = config.contrastive_weight * alignment(
        out["z_image"], out["z_text"], see * read, config.temperature
    )
    for view, w in weight.items():
        total = total + mean(cross_entropy_rows(out[view], target, multi_label), w)
    return total


def _dropped(model, h_image, h_text, rows):
    """Dropout on the features of the first `rows` rows."""
    if not model.dropout:
        return h_image, h_text
    return tuple(
        torch.cat([F.dropout(h[:rows], model.dropout), h[rows:]])
        if rows < len(h)
        else F.dropout(h, model.dropout)
        for h in (h_image, h_text)
    )


def training_loss(model, rows, draw, train, multi_label):
    """What the original and the references are trained with."""
    rows = augment(rows, draw, train)
    h = model.features(rows["image"]), model.read(rows["text"])
    out = model.heads(
        *_dropped(model, *h, len(draw)), rows["has_image"], rows["has_text"]
    )
    return classification(out, rows, train, multi_label)


def neggrad_loss(model, retain, unlearn, draw, train, neggrad, multi_label):
    """Down on retain rows, up on unlearn rows, both in one pass."""
    retain, count = augment(retain, draw, train), len(draw)
    unlearn = {**unlearn, "image": unlearn["image"] / 255.0}
    names = ("image", "text", "has_image", "has_text")
    image, text, *has = (torch.cat([retain[name], unlearn[name]]) for name in names)
    h = _dropped(model, model.features(image), model.read(text), count)
    out = model.heads(*h, *has)
    keep = {name: x[:count] for name, x in out.items()}
    guess = MULTI_LABEL_SCALE * math.log(2) if multi_label else None
    guess = guess or math.log(out["image"].shape[1])
    forget = 0.0
    for view in ("image", "fused"):
        each = cross_entropy_rows(out[view][count:], unlearn["labels"], multi_label)
        each = each.clamp(max=neggrad.loss_cap * guess)
        forget = forget + mean(each, unlearn["has_image"].float())
    keep = classification(keep, retain, train, multi_label)
    return neggrad.retain_weight * keep - (1 - neggrad.retain_weight) * forget


# --- the steps ------------------------------------------------------------------------


class Training:
    """Steps of training, or of NegGrad+, from the parameters that the model has.

    Args:
        world: `bench_torch.World`.
        model: a copy that may be changed.
        kind: "original" or "neggrad_plus".
        plan: rows of every step by part of the batch, [steps, batch] on the device.
        steps: of the whole training, for its learning rate.
        compiled: whether `torch.compile` makes the loss.
    """

    def __init__(self, world, model, kind, plan, steps, compiled):  # noqa: D107
        config, train = world.config, world.config.train
        self._world, self._model, self._plan = world, model.train(), plan
        self._draws = width_of(world.table["text"].shape[1])
        self._kind = kind
        loss = training_loss if kind == "original" else neggrad_loss
        self._loss = torch.compile(loss) if compiled else loss
        section = train if kind == "original" else config.neggrad_plus
        rising = 0
        if kind == "original":
            rising = min(round(train.warmup_fraction * steps), steps - 1)
        text = [x for part in TEXT for x in getattr(model, part).parameters()]
        of_text = set(map(id, text))
        rest = [x for x in model.parameters() if id(x) not in of_text]
        rate = section.learning_rate
        self._optimiser = torch.optim.AdamW(
            [{"params": rest}, {"params": text, "lr": rate * train.text_lr_scale}],
            lr=rate,
            betas=(0.9, 0.98),
            weight_decay=train.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser, lambda step: _cosine(step, rising, steps)
        )
        self._params = [*rest, *text]

    def run(self, steps: int) -> None:
        """Makes so many steps."""
        for step in range(steps):
            self._step({n: rows[step % len(rows)] for n, rows in self._plan.items()})

    def _step(self, index):
        world, train = self._world, self._world.config.train
        batch = {
            name: {key: x[rows] for key, x in world.table.items()}
            for name, rows in index.items()
        }
        rows = batch["rows" if self._kind == "original" else "retain"]
        draw = torch.rand(len(rows["text"]), self._draws, device=world.device)
        self._optimiser.zero_grad()
        if self._kind == "original":
            loss = self._loss(self._model, rows, draw, train, world.multi_label)
        else:
            loss = self._loss(
                self._model,
                rows,
                batch["unlearn"],
                draw,
                train,
                world.config.neggrad_plus,
                world.multi_label,
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._params, 1.0)
        self._optimiser.step()
        self._schedule.step()


def _cosine(step, rising, steps):
    if step < rising:
        return step / rising
    return (1 + math.cos(math.pi * min((step - rising) / (steps - rising), 1))) / 2
