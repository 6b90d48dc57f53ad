"""The classifier of `ccu_jax.models` in plain PyTorch, with the same parameters.

Letters: B rows, T tokens, P image tokens, W width, S image side, K classes.
"""

import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ccu_jax.config import Model

_PIXEL_MEAN, _PIXEL_STD, _BINS = 0.5, 0.3, 8
# Names of Flax's leaves in PyTorch; kernels are stored transposed.
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class Attention(nn.Module):
    """The attention half of a pre-norm block; `query` [B, Q, W] attends to x."""

    def __init__(self, width: int, heads: int):
        """Makes the projections of `heads` heads."""
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None, query=None):
        """Returns [B, T, W], or [B, Q, W] with a query."""
        y = self.ln_1(x)
        if query is None:
            query, parts = x, self.qkv(y).chunk(3, dim=-1)
        else:
            width = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(self.ln_1(query), weight[:width], bias[:width])
            parts = (q, *F.linear(y, weight[width:], bias[width:]).chunk(2, dim=-1))
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return query + self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, width: int):
        """Makes both layers."""
        super().__init__()
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x):
        """Returns [B, T, W]."""
        return x + self.proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class Block(nn.Module):
    """Attention, then a feed-forward layer."""

    def __init__(self, width: int, heads: int):
        """Makes both halves."""
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width)

    def forward(self, x, mask=None, query=None):
        """Returns [B, T, W], or [B, Q, W] with a query."""
        return self.feed_forward(self.attention(x, mask, query))


def edge_histograms(x, cell: int):
    """Returns histograms of edge directions [B, 8, S / cell, S / cell]."""
    gray = F.pad(x.sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    dx = gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]
    dy = gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]
    strength = torch.sqrt(dx * dx + dy * dy + 1e-6)
    angle = torch.arange(_BINS, device=x.device) * math.pi / _BINS
    angle = angle.to(x.dtype)[:, None, None]
    along = (dx * torch.cos(angle) + dy * torch.sin(angle)) / strength
    h = strength * along.square().square().square()
    return torch.sqrt(F.avg_pool2d(h, cell) * cell + 1e-6)


def _patches(x, side: int):
    """Cuts [B, C, S, S] into squares: [B, (S / side)^2, side * side * C]."""
    batch, channels, size, _ = x.shape
    cells = size // side
    x = x.reshape(batch, channels, cells, side, cells, side)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, cells * cells, -1)


class ImageTrunk(nn.Module):
    """Images [B, 3, S, S] in 0..1 to tokens; to two tokens if no block is left."""

    def __init__(self, config: Model, image_size: int):
        """Makes the patch embedding and all blocks but those of the tail."""
        super().__init__()
        width = config.image_width
        self.patch, self.cell = config.patch, max(config.patch // 2, 1)
        edges = _BINS * (self.patch // self.cell) ** 2
        tokens = (image_size // self.patch) ** 2 + 1
        self.patches = nn.Linear(3 * self.patch**2 + edges, width, bias=False)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        has_attention = not config.tail_blocks
        self.depth = config.image_depth - config.tail_blocks - has_attention
        for i in range(self.depth):
            self.add_module(f"block_{i}", Block(width, config.heads))
        self.attention = Attention(width, config.heads) if has_attention else None

    def forward(self, image):
        """Returns [B, P, W]."""
        x = (image - _PIXEL_MEAN) / _PIXEL_STD
        edges = _patches(edge_histograms(x, self.cell), self.patch // self.cell)
        x = self.patches(torch.cat([_patches(x, self.patch) / 2, edges], dim=-1))
        token = self.class_token.to(x.dtype).expand(len(x), -1, -1)
        x = self.ln_pre(torch.cat([token, x], dim=1) + self.position)
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        if self.attention is None:
            return x
        return self.attention(x, query=_pool(x))


def _pool(x):
    """Returns the class token and the mean of the patches, [B, 2, W]."""
    return torch.stack([x[:, 0], x[:, 1:].mean(1)], dim=1)


class ImageTail(nn.Module):
    """Tokens of the trunk to the image feature [B, W]."""

    def __init__(self, config: Model):
        """Makes the last blocks, or the last feed-forward layer."""
        super().__init__()
        self.depth = config.tail_blocks
        for i in range(self.depth):
            self.add_module(f"block_{i}", Block(config.image_width, config.heads))
        if not self.depth:
            self.feed_forward = FeedForward(config.image_width)
        self.ln_post = nn.LayerNorm(config.image_width, eps=1e-6)

    def forward(self, x):
        """Returns [B, W] in float32."""
        for i in range(self.depth):
            query = _pool(x) if i == self.depth - 1 else None
            x = getattr(self, f"block_{i}")(x, query=query)
        if not self.depth:
            x = self.feed_forward(x)
        return self.ln_post(x).mean(1).float()


class TextTower(nn.Module):
    """Token ids [B, T] to the text feature [B, W]."""

    def __init__(self, config: Model, vocabulary: int, length: int):
        """Makes the embedding and all blocks."""
        super().__init__()
        width = config.text_width
        self.tokens = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.depth = config.text_depth
        for i in range(self.depth):
            self.add_module(f"block_{i}", Block(width, config.heads))
        self.ln_final = nn.LayerNorm(width, eps=1e-6)

    def forward(self, text):
        """Returns the mean over tokens, [B, W] in float32."""
        is_token = (text > 0).float()
        x = self.tokens(text) + self.position
        # Added, not boolean: a row of padding only must stay finite.
        mask = ((is_token - 1) * 1e9)[:, None, None, :]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x, mask.to(x.dtype))
        weight = is_token / is_token.sum(1, keepdim=True).clamp(min=1)
        return (self.ln_final(x).float() * weight[..., None]).sum(1)


class FusedHead(nn.Module):
    """Logits [B, K] of both features, with a learned vector for a missing one."""

    def __init__(self, config: Model, classes: int):
        """Makes the deep and the wide branch."""
        super().__init__()
        image, text = config.image_width, config.text_width
        self.no_image = nn.Parameter(torch.zeros(image))
        self.no_text = nn.Parameter(torch.zeros(text))
        self.ln_image = nn.LayerNorm(image, eps=1e-6)
        self.ln_text = nn.LayerNorm(text, eps=1e-6)
        self.fc = nn.Linear(image + text, text)
        self.deep = nn.Linear(text, classes)
        self.wide = nn.Linear(image + text, classes)

    def forward(self, h_image, h_text, has_image, has_text):
        """Returns [B, K]."""
        image = torch.where(has_image[:, None], self.ln_image(h_image), self.no_image)
        text = torch.where(has_text[:, None], self.ln_text(h_text), self.no_text)
        both = torch.cat([image, text], dim=-1)
        hidden = F.gelu(self.fc(both), approximate="tanh")
        return self.deep(hidden) + self.wide(both)


class Classifier(nn.Module):
    """The image+text classifier; modules have the names of the parameter tree."""

    def __init__(
        self,
        config: Model,
        classes: int,
        vocabulary: int,
        image_size: int,
        text_length: int,
    ):
        """Makes both towers, projections and heads."""
        super().__init__()
        image, text, embed = config.image_width, config.text_width, config.embed_dim
        self.dropout, self.dtype = config.dropout, config.dtype
        self.image_trunk = ImageTrunk(config, image_size)
        self.image_tail = ImageTail(config)
        self.text = TextTower(config, vocabulary, text_length)
        self.image_projection = nn.Linear(image, embed, bias=False)
        self.text_projection = nn.Linear(text, embed, bias=False)
        self.image_head = nn.Linear(image, classes)
        self.text_head = nn.Linear(text, classes)
        self.fused_head = FusedHead(config, classes)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        # Heads compute in float32, as they do in Flax.
        if self.dtype != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def encode_image(self, image: Tensor) -> Tensor:
        """Returns features [B, W] before dropout of images [B, 3, S, S] in 0..1."""
        with self._autocast(image.device):
            if self.dtype == "bfloat16":
                image = image.bfloat16()
            return self.image_tail(self.image_trunk(image))

    def encode_text(self, text: Tensor) -> Tensor:
        """Returns features [B, W] before dropout of token ids [B, T]."""
        with self._autocast(text.device):
            return self.text(text)

    def heads(self, h_image, h_text, has_image, has_text) -> dict[str, Tensor]:
        """Returns logits [B, K] of the three views, and unit embeddings [B, D]."""
        return {
            "image": self.image_head(h_image),
            "text": self.text_head(h_text),
            "fused": self.fused_head(h_image, h_text, has_image, has_text),
            "z_image": _normalize(self.image_projection(h_image)),
            "z_text": _normalize(self.text_projection(h_text)),
        }


def _normalize(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-12)


def load_params(model: Classifier, params: dict[str, np.ndarray]) -> None:
    """Loads Flax parameters, named `module/.../leaf`.

    Raises:
        RuntimeError: a name or a shape is not the classifier's.
    """
    state, queries = {}, {}
    for name, x in params.items():
        *path, leaf = name.split("/")
        x = torch.from_numpy(np.array(x.T if leaf == "kernel" else x, order="C"))
        if path[-1:] == ["query"]:
            queries[tuple(path[:-1]), leaf] = x
        else:
            state[".".join([*path, _LEAVES.get(leaf, leaf)])] = x
    # PyTorch has one projection for queries, keys and values.
    for (path, leaf), x in queries.items():
        leaf = _LEAVES.get(leaf, leaf)
        key_value = state.pop(".".join([*path, "key_value", leaf]))
        state[".".join([*path, "qkv", leaf])] = torch.cat([x, key_value])
    model.load_state_dict(state)
