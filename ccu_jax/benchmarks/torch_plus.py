"""A whole run of ccu_plus in plain PyTorch: `methods/ccu.py` on stored features.

As one writes it in eager mode: tables and row gathers on the device, nothing in Python
for each row, nothing computed that no objective looks at, no gradients at refreshes.
"""

import copy
import math

import torch
import torch.nn.functional as F

from ccu_jax.benchmarks import torch_targets as targets
from ccu_jax.benchmarks.torch_model import TAIL, unit
from ccu_jax.benchmarks.torch_train import (
    MULTI_LABEL_SCALE,
    cross_entropy_rows,
    hidden,
    mean,
)

VISUAL = ("image", "fused")


def positives(a, b):
    """Jaccard similarity of label sets."""
    shared = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1) - shared
    return shared / either.clamp(min=1)


def divergence_rows(teacher, logits, multi_label):
    """KL divergence of each row from a teacher's predictions."""
    if multi_label:
        p = teacher.sigmoid()
        apart = F.softplus(logits) - F.softplus(teacher) - p * (logits - teacher)
        return MULTI_LABEL_SCALE * apart.mean(-1)
    t, s = teacher.log_softmax(1), logits.log_softmax(1)
    return (t.exp() * (t - s)).sum(1)


def pair_dissociation(z_u, u, r, offset):
    """Loosen a forgotten picture from its own text, no further than is natural."""
    share = positives(u["labels"], r["labels"]) * (r["has_image"] & r["has_text"])
    count = share.sum(1)
    usual = (z_u.detach() @ r["z_text"].T * share).sum(1) / count.clamp(min=1e-9)
    excess = (z_u * u["z_text"]).sum(1) - usual - offset
    return mean(excess**2, u["has_image"] & u["has_text"] & (count > 0))


def separation(h_r, h_u, u, r, temperature):
    """SupCon over retain rows, forgotten pictures as further negatives."""
    h_r, h_u = unit(h_r), unit(h_u.detach())
    own = torch.eye(len(h_r), dtype=torch.bool, device=h_r.device)
    other = ~own & r["has_image"]
    share = positives(r["labels"], r["labels"]) * other
    near = h_r @ h_r.T / temperature
    far = (h_r @ h_u.T / temperature).masked_fill(~u["has_image"], -1e9)
    every = torch.cat([near.masked_fill(~other, -1e9), far], dim=1)
    log_p = near - every.logsumexp(1, keepdim=True)
    count = share.sum(1)
    each = -(share * log_p).sum(1) / count.clamp(min=1e-9)
    return mean(each, r["has_image"] & (count > 0))


def retention(rows, said, whole, multi_label):
    """Keep what the original says, alone and, of `whole` rows, with the text."""
    counts = {"image": rows["has_image"], "fused": rows["has_image"] & whole}
    return sum(
        mean(divergence_rows(rows[f"original_{view}"], said[view], multi_label), counts)
        for view, counts in counts.items()
    )


def loss(model, parts, index, aux, ranks, draw, config, rate, multi_label):
    """All objectives, weighted.

    Args:
        model: the classifier.
        parts: the tables `unlearn`, `retain`, `held`.
        index: rows of this step in each.
        aux: from `refresh`.
        ranks: from `targets.prepare`.
        draw: random numbers [B, 2] that hide a modality of retain rows.
        config: `config.CcuPlus`.
        rate: of the hiding.
        multi_label: whether rows have several labels.
    """
    u, r, v = (
        {key: x[index[name]] for key, x in parts[name].items()}
        for name in ("unlearn", "retain", "held")
    )
    see, read = hidden(r["has_image"], r["has_text"], draw, rate)
    sizes = [len(x["labels"]) for x in (u, r, v)]
    h_image = model.behind(torch.cat([x["features"] for x in (u, r, v)]))
    h_u, h_r, h_v = h_image.split(sizes)
    h_r, text_r = (F.dropout(h, model.dropout) for h in (h_r, r["h_text"]))
    has = [
        torch.cat([u[n], x, v[n]]) for n, x in (("has_image", see), ("has_text", read))
    ]
    h_image = torch.cat([h_u, h_r, h_v])
    h_text = torch.cat([u["h_text"], text_r, v["h_text"]])
    said = model.image_head(h_image), model.fused_head(h_image, h_text, *has)
    said = zip(*(x.split(sizes) for x in said), strict=True)
    said_u, said_r, said_v = (dict(zip(VISUAL, x, strict=True)) for x in said)
    total = 0.0
    if config.pair_dissociation:
        z_u = unit(model.image_projection(h_u))
        total = config.pair_dissociation * pair_dissociation(z_u, u, r, aux["offset"])
    if config.separation:
        apart = separation(h_r, h_u, u, r, config.temperature)
        total = total + config.separation * apart
    sure = u["has_image"] & ~ranks.free
    for view in VISUAL:
        aim, at = aux[view][index["unlearn"]], aux["level"][view][index["unlearn"]]
        rows = cross_entropy_rows(said_u[view], aim, multi_label)
        total = total + config.target_match * mean(rows, u["has_image"])
        if config.match_confidence:
            g = targets.confidence(said_u[view], u["labels"], multi_label)
            rows = F.smooth_l1_loss(g, at, reduction="none")
            total = total + config.match_confidence * mean(rows, sure)
        if config.task_loss:
            rows = cross_entropy_rows(said_r[view], r["labels"], multi_label)
            total = total + config.task_loss * mean(rows, r["has_image"])
    whole = (see == r["has_image"]) & (read == r["has_text"])
    total = total + config.retention * retention(r, said_r, whole, multi_label)
    if config.heldout_retention:
        kept = retention(v, said_v, v["has_image"], multi_label)
        total = total + config.heldout_retention * kept
    return total


@torch.no_grad()
def refresh(model, parts, ranks, lead, gain, multi_label):
    """Targets under the model as it is, and the natural nearness of pairs."""
    seen, h_image = {}, {}
    for name in ("unlearn", "held"):
        part = parts[name]
        h = h_image[name] = model.behind(part["features"])
        has = part["has_image"], part["has_text"]
        seen[name] = {
            "image": model.image_head(h),
            "fused": model.fused_head(h, part["h_text"], *has),
            "text": part["original_text"],
            "labels": part["labels"],
        }
    aims = targets.current(
        ranks, seen["unlearn"], seen["held"], lead, gain, multi_label
    )
    z_image = unit(model.image_projection(h_image["held"]))
    return {**aims, "offset": _pair_offset(z_image, parts["held"])}


def _pair_offset(z_image, held):
    share = positives(held["labels"], held["labels"]).fill_diagonal_(0)
    share = share * held["has_text"]
    cosine = z_image @ held["z_text"].T
    count = share.sum(1)
    usual = (cosine * share).sum(1) / count.clamp(min=1e-9)
    return mean(cosine.diagonal() - usual, held["has_text"] & (count > 0))


class Plus:
    """Runs of ccu_plus, one after the other, each from the model's parameters.

    Args:
        world: `bench_torch_child.World`, with the stored columns.
        model: the original; it stays as it is.
        plan: rows of every step by part, [steps, batch] on the device.
        compiled: whether `torch.compile` makes losses and refreshes.
    """

    def __init__(self, world, model, plan, compiled):  # noqa: D107
        self._world, self._plan = world, plan
        # What is not trained is shared, and has no gradients.
        memo = {
            id(x): x
            for name, x in model.named_parameters()
            if name.partition(".")[0] not in TAIL
        }
        self._model = copy.deepcopy(model, memo).train()
        self._original = [x.detach() for part in TAIL for x in _of(model, part)]
        self._params = [x for part in TAIL for x in _of(self._model, part)]
        for x in self._model.parameters():
            x.requires_grad_(False)
        for x in self._params:
            x.requires_grad_(True)
        make = torch.compile if compiled else lambda fn: fn
        self._loss, self._refresh = make(loss), make(refresh)

    def start(self, draws=None) -> None:
        """From the request to the first step: rows to the device, ridge, ranks.

        Args:
            draws: random numbers for the ranks, [2, U]; drawn by default.
        """
        world, config = self._world, self._world.config.ccu_plus
        with torch.no_grad():
            self._parts = {name: self._part(rows) for name, rows in world.rows.items()}
            if draws is None:
                count = len(self._parts["unlearn"]["labels"])
                draws = torch.rand(2, count, device=world.device)
            named = [
                {
                    "pooled": _pool(part["features"]),
                    **{name: part[name] for name in ("fresh", "labels")},
                    **{v: part[f"original_{v}"] for v in ("image", "text", "fused")},
                }
                for part in (self._parts[x] for x in ("unlearn", "held", "retain"))
            ]
            self._ranks = targets.prepare(
                *named, draws, config.ridge, world.multi_label
            )
            torch._foreach_copy_(self._params, self._original)
        zero = torch.zeros(len(VISUAL), device=world.device)
        self._aux = {"lead": dict(zip(VISUAL, zero, strict=True))}
        self._optimiser = torch.optim.Adam(
            self._params, lr=config.learning_rate, eps=1e-5, fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser, lambda t: (1 + math.cos(math.pi * t / config.steps)) / 2
        )

    def _part(self, rows):
        world = self._world
        table = {
            name: torch.from_numpy(x[rows]).to(world.device)
            for name, x in world.store.items()
        }
        index = torch.from_numpy(rows).to(world.device)
        for name in ("labels", "has_image", "has_text"):
            table[name] = world.table[name][index]
        return table

    def run(self, steps: int) -> None:
        """Makes so many steps, with the refreshes that are due."""
        world, config = self._world, self._world.config.ccu_plus
        model, parts, ranks = self._model, self._parts, self._ranks
        used = {name: {k: parts[name][k] for k in _USED[name]} for name in _USED}
        rate = world.config.train.modality_dropout
        for step in range(steps):
            if step % config.refresh_every == 0:
                self._aux = self._refresh(
                    model,
                    parts,
                    ranks,
                    self._aux["lead"],
                    config.feedback_gain,
                    world.multi_label,
                )
            index = {name: rows[step] for name, rows in self._plan.items()}
            draw = torch.rand(len(index["retain"]), 2, device=world.device)
            self._optimiser.zero_grad()
            self._loss(
                model,
                used,
                index,
                self._aux,
                ranks,
                draw,
                config,
                rate,
                world.multi_label,
            ).backward()
            torch.nn.utils.clip_grad_norm_(self._params, 1.0)
            self._optimiser.step()
            self._schedule.step()


# The columns that steps gather: no others are touched.
_EVERY = ("features", "h_text", "has_image", "has_text", "labels")
_KEPT = ("original_image", "original_fused")
_USED = {
    "unlearn": (*_EVERY, "z_text"),
    "retain": (*_EVERY, "z_text", *_KEPT),
    "held": (*_EVERY, *_KEPT),
}


def _of(model, part):
    return list(getattr(model, part).parameters())


def _pool(features):
    features = features.float()
    return torch.cat([features[:, 0], features[:, 1:].mean(1)], dim=1)
