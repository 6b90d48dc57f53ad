"""The targets of ccu_plus in plain PyTorch: `methods/targets.py` and its statistics.

All rows count here: without compiled shapes to keep, no table is filled up.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

SMALL, FRESH_RIDGE, MOST_LEAD = 1e-30, 0.3, 3.0


class Ranks(NamedTuple):
    """What is fixed before the first step; see `methods/targets.py`."""

    base: torch.Tensor
    text: torch.Tensor
    known: torch.Tensor
    image: torch.Tensor
    fused: torch.Tensor
    free: torch.Tensor


def ridge(features, labels, strength):
    """`predict`, and what it would say of its own rows without them."""
    mean, prior = features.mean(0), labels.mean(0)
    a = features - mean
    gram = a.T @ a
    gram.diagonal().add_(strength * gram.trace() / len(gram))
    both = torch.cat([a.T @ (labels - prior), a.T], dim=1)
    solved = torch.cholesky_solve(both, torch.linalg.cholesky(gram))
    fitted, inverse = solved[:, : labels.shape[1]], solved[:, labels.shape[1] :]

    def predict(x):
        return (x - mean) @ fitted + prior

    leverage = (a * inverse.T).sum(1, keepdim=True) + 1 / len(a)
    return predict, labels - (labels - predict(features)) / (1 - leverage)


def share_below(x, rising):
    """Share of values, in rising order, below each x, ties counting half."""
    below = torch.searchsorted(rising, x)
    upto = torch.searchsorted(rising, x, right=True)
    return ((below + upto) / 2 + 0.5) / (len(rising) + 1)


def fit_line(x, y):
    """Least squares with a constant: the prediction as a function."""
    x = F.pad(x, (0, 1), value=1.0)
    gram = x.T @ x
    gram.diagonal().add_(1e-3)
    found = torch.linalg.solve(gram, x.T @ y)
    return lambda x: x @ found[:-1] + found[-1]


def log_likelihood(logits, labels, multi_label):
    """Sum of the log-probabilities of the true label values."""
    if multi_label:
        return -F.softplus(torch.where(labels > 0, -logits, logits)).sum(1)
    true = (labels * logits).sum(1)
    other = logits.masked_fill(labels > 0, -torch.inf).logsumexp(1)
    return -F.softplus(other - true)


def confidence(logits, labels, multi_label):
    """`g` of each row."""
    return -torch.log((-log_likelihood(logits, labels, multi_label)).clamp(min=SMALL))


def as_logits(scores):
    """Ridge scores near 0..1 of several labels as logits."""
    return torch.logit(scores.clamp(0.02, 0.98))


def margin(scores, labels, multi_label):
    """How well scores fit the labels."""
    if multi_label:
        return confidence(as_logits(scores), labels, True)
    other = scores.masked_fill(labels > 0, -torch.inf).amax(1)
    return (scores * labels).sum(1) - other


def hits(scores, labels):
    """Share of each row's true labels among its as many highest scores."""
    place = (-scores).argsort(dim=1, stable=True).argsort(dim=1)
    count = labels.sum(1, keepdim=True)
    return ((place < count) * labels).sum(1) / count[:, 0].clamp(min=1)


def of_alike(x_u, x_v, y_v, choice):
    """For each u, y of a v with a like x."""
    rising, order = x_v.sort(stable=True)
    reach = (choice - 0.5) * max(len(x_v) // 10, 1)
    place = torch.searchsorted(rising, x_u) + reach.round().long()
    return y_v[order][place.clamp(0, len(x_v) - 1)]


def _bisect(short, low, high):
    for _ in range(30):
        middle = (low + high) / 2
        less = short(middle)
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return low


def with_confidence(base, labels, g, multi_label):
    """Probabilities whose confidence is `g`, otherwise as `base` says."""
    total = -torch.exp(-g)
    if not multi_label:
        p = total.exp()[:, None]
        other = base.masked_fill(labels > 0, -1e9).softmax(1)
        return p * labels + (1 - p) * other
    toward = 2 * labels - 1

    def short(move):
        moved = base + move[:, None] * toward
        return log_likelihood(moved, labels, True) < total

    most = torch.full_like(total, 30.0)
    return torch.sigmoid(base + _bisect(short, -most, most)[:, None] * toward)


def prepare(u, v, r, draws, strength, multi_label) -> Ranks:
    """All that is fixed.

    Args:
        u, v, r: rows with `pooled`, `fresh`, `labels`, and the original's logits
            `image`, `text`, `fused`.
        draws: two random numbers in 0..1 for each forgotten row, [2, U].
        strength: of the ridge.
        multi_label: whether rows have several labels.
    """
    predict, score_r = ridge(r["pooled"], r["labels"], strength)
    score_u, score_v = predict(u["pooled"]), predict(v["pooled"])
    common = r["labels"].sum(0)
    if multi_label:
        base = as_logits(score_u)
        text = u["text"] - as_logits(common / len(r["labels"]))
    else:
        text = u["text"].log_softmax(1)
        wanted = v["image"].softmax(1).amax(1).mean()

        def short(factor):
            return (factor * score_v).softmax(1).amax(1).mean() < wanted

        most = torch.full((), 100.0, device=score_u.device)
        base = _bisect(short, torch.zeros_like(most), most) * score_u
    return Ranks(
        base=base,
        text=text,
        known=common > 0,
        image=_image_ranks(u, v, r, score_u, score_v, draws[0], multi_label),
        fused=(draws[1].argsort().argsort() + 0.5) / len(draws[1]),
        free=_unlike(hits(score_u, u["labels"]), hits(score_r, r["labels"])),
    )


def _image_ranks(u, v, r, score_u, score_v, draw, multi_label):
    plain, _ = ridge(r["fresh"], r["labels"], FRESH_RIDGE)
    margins = [margin(plain(x["fresh"]), x["labels"], multi_label) for x in (u, v)]
    place = share_below(margins[0], margins[1].sort()[0])
    x_v = margin(score_v, v["labels"], multi_label)[:, None]
    y_v = confidence(v["image"], v["labels"], multi_label)
    line = fit_line(x_v, y_v)
    rest = (y_v - line(x_v)).sort()[0]
    order = line(margin(score_u, u["labels"], multi_label)[:, None])
    order = order + rest[(draw * len(rest)).long()]
    return place.sort()[0][order.argsort().argsort()]


def _unlike(hit_u, hit_r):
    error = sum(hit.var(correction=0) / len(hit) for hit in (hit_u, hit_r)).sqrt()
    return hit_r.mean() - hit_u.mean() > (4 * error).clamp(min=0.1)


def current(ranks: Ranks, u, v, lead, gain, multi_label):
    """Targets under the model as it is: `image`, `fused`, `level`, `lead`.

    Args:
        ranks: from `prepare`.
        u, v: rows with `labels`, the original's `text` and the current model's `image`
            and `fused`.
        lead: by view, what the last call gave.
        gain: how fast it grows.
        multi_label: whether rows have several labels.
    """
    views = ("image", "text", "fused")
    held = {x: confidence(v[x], v["labels"], multi_label) for x in views}
    now = {x: confidence(u[x], u["labels"], multi_label) for x in views}
    image_u = torch.quantile(held["image"], ranks.image)
    x_v = torch.stack([held["image"], held["text"]], dim=1)
    line = fit_line(x_v, held["fused"])
    x_u = torch.stack([image_u, now["text"]], dim=1)
    fused_u = of_alike(line(x_u), line(x_v), held["fused"], ranks.fused)
    level, grown = {}, {}
    for view, aim in (("image", image_u), ("fused", fused_u)):
        rising, spread = held[view].sort()[0], held[view].std(correction=0)
        both = share_below(torch.stack([now[view], aim]), rising)
        above = (both[0] - both[1]).mean()
        most = MOST_LEAD * spread
        grown[view] = (lead[view] + gain * spread * above).clamp(-most, most)
        level[view] = aim - grown[view]
    aims = _probabilities(ranks, u["labels"], level, multi_label)
    return {**aims, "level": level, "lead": grown}


def _probabilities(ranks, labels, level, multi_label):
    base, known = ranks.base, ranks.known
    never = torch.where(known, base, -10.0 if multi_label else -1e9)
    usual = (base * known).sum(1, keepdim=True) / known.sum().clamp(min=1)
    both = torch.where(known, base, usual) + ranks.text
    squash = torch.sigmoid if multi_label else lambda x: x.softmax(1)
    aims = {}
    for view, plain, start in (("image", never, base), ("fused", both, both)):
        aim = with_confidence(start, labels, level[view], multi_label)
        aims[view] = torch.where(ranks.free, squash(plain), aim)
    return aims
