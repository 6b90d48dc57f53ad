"""The classifier of `models/` in PyTorch, as pure functions of its parameters.

Parameters are keyed by their Flax paths, such as `text/block_0/feed_forward/fc/bias`;
the kernels of dense layers are transposed, as `F.linear` expects.

Letters: B rows, T tokens, W width, S side of an image, K classes, D embedding size.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ccu_jax.config import Model

_PIXEL_MEAN, _PIXEL_STD, _BINS = 0.5, 0.3, 8  # as in models/towers.py
Params = dict[str, Tensor]
Rows = dict[str, Tensor]


def _dense(p: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}/kernel"], p.get(f"{name}/bias"))


def _layer_norm(p: Params, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}/scale"], p[f"{name}/bias"], 1e-6)


def _mlp(p: Params, name: str, x: Tensor, out: str) -> Tensor:
    hidden = F.gelu(_dense(p, f"{name}/fc", x), approximate="tanh")
    return _dense(p, f"{name}/{out}", hidden)


def _attention(
    p: Params, name: str, x: Tensor, heads: int, mask=None, query=None
) -> Tensor:
    """Applies residual pre-norm attention over x; self-attention if `query` is None."""
    query = x if query is None else query
    q = _dense(p, f"{name}/query", _layer_norm(p, f"{name}/ln_1", query))
    y = _dense(p, f"{name}/key_value", _layer_norm(p, f"{name}/ln_1", x))
    qkv = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, *y.chunk(2, -1)))
    mixed = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    return query + _dense(p, f"{name}/out", mixed.transpose(1, 2).flatten(2))


def _feed_forward(p: Params, name: str, x: Tensor) -> Tensor:
    return x + _mlp(p, name, _layer_norm(p, f"{name}/ln_2", x), "proj")


def _block(p: Params, name: str, x: Tensor, heads: int, mask=None) -> Tensor:
    x = _attention(p, f"{name}/attention", x, heads, mask)
    return _feed_forward(p, f"{name}/feed_forward", x)


def edge_histograms(x: Tensor, cell: int) -> Tensor:
    """Returns edge orientation histograms `[B, 8, S / cell, S / cell]`."""
    gray = F.pad(x.sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    dx = gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]
    dy = gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]
    strength = torch.sqrt(dx * dx + dy * dy + 1e-6)
    angle = torch.arange(_BINS, device=x.device) * math.pi / _BINS
    angle = angle.to(x.dtype)[:, None, None]
    along = (dx * torch.cos(angle) + dy * torch.sin(angle)) / strength
    h = strength * along.square().square().square()
    return torch.sqrt(F.avg_pool2d(h, cell) * cell + 1e-6)


def _extract_patches(x: Tensor, side: int) -> Tensor:
    """Cuts `[B, C, S, S]` into patches: `[B, (S / side)^2, side * side * C]`."""
    x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _autocast(config: Model, device: torch.device) -> torch.autocast:
    # Heads run outside autocast, in float32, as in Flax.
    return torch.autocast(device.type, torch.bfloat16, config.dtype == "bfloat16")


def encode_image(p: Params, image: Tensor, config: Model) -> Tensor:
    """Returns features `[B, W]` of images `[B, 3, S, S]` in [0, 1]."""
    with _autocast(config, image.device):
        x = image.bfloat16() if config.dtype == "bfloat16" else image
        x = (x - _PIXEL_MEAN) / _PIXEL_STD
        cell = max(config.patch // 2, 1)
        edges = _extract_patches(edge_histograms(x, cell), config.patch // cell)
        x = torch.cat([_extract_patches(x, config.patch) / 2, edges], dim=-1)
        x = _dense(p, "image_trunk/patches", x)
        token = p["image_trunk/class_token"].to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([token, x], dim=1) + p["image_trunk/position"]
        x = _layer_norm(p, "image_trunk/ln_pre", x)
        for i in range(config.image_depth - 1):
            x = _block(p, f"image_trunk/block_{i}", x, config.heads)
        # The last block has two queries: the class token and the mean patch token.
        pooled = torch.stack([x[:, 0], x[:, 1:].mean(1)], dim=1)
        x = _attention(p, "image_trunk/attention", x, config.heads, query=pooled)
        x = _feed_forward(p, "image_tail/feed_forward", x)
        return _layer_norm(p, "image_tail/ln_post", x).mean(1).float()


def encode_text(p: Params, text: Tensor, config: Model) -> Tensor:
    """Returns mean-pooled features `[B, W]` of token ids `[B, T]`."""
    with _autocast(config, text.device):
        is_token = (text > 0).float()
        x = F.embedding(text, p["text/tokens/embedding"]) + p["text/position"]
        x = x.bfloat16() if config.dtype == "bfloat16" else x
        # An additive mask: with a boolean one, rows with only padding would be NaN.
        mask = ((is_token - 1) * 1e9)[:, None, None, :].to(x.dtype)
        for i in range(config.text_depth):
            x = _block(p, f"text/block_{i}", x, config.heads, mask)
        weight = is_token / is_token.sum(1, keepdim=True).clamp(min=1)
        return (_layer_norm(p, "text/ln_final", x).float() * weight[..., None]).sum(1)


def _fuse(p: Params, h_image: Tensor, h_text: Tensor, rows: Rows) -> Tensor:
    parts = []
    for name, h in (("image", h_image), ("text", h_text)):
        h = _layer_norm(p, f"fused_head/ln_{name}", h)
        has = rows[f"has_{name}"][:, None]
        parts.append(torch.where(has, h, p[f"fused_head/no_{name}"]))
    both = torch.cat(parts, dim=-1)
    return _mlp(p, "fused_head", both, "deep") + _dense(p, "fused_head/wide", both)


def _normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-12)


def apply(p: Params, rows: Rows, config: Model, num_dropout: int = 0) -> Rows:
    """Returns the logits `[B, K]` of the three views and unit embeddings `[B, D]`.

    Dropout is applied to the features of the first `num_dropout` rows.
    """
    h_image = encode_image(p, rows["image"], config)
    h_text = encode_text(p, rows["text"], config)
    if config.dropout and num_dropout:
        h_image, h_text = (
            torch.cat([F.dropout(h[:num_dropout], config.dropout), h[num_dropout:]])
            for h in (h_image, h_text)
        )
    return {
        "image": _dense(p, "image_head", h_image),
        "text": _dense(p, "text_head", h_text),
        "fused": _fuse(p, h_image, h_text, rows),
        "z_image": _normalize(_dense(p, "image_projection", h_image)),
        "z_text": _normalize(_dense(p, "text_projection", h_text)),
    }
