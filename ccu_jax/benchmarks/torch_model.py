"""The classifier of `ccu_jax.models` in plain PyTorch, with its very parameters.

Written as one writes PyTorch: `scaled_dot_product_attention`, autocast for bfloat16,
pictures averaged by `avg_pool2d`. Shapes are named as in `models/towers.py`.
"""

import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ccu_jax.config.schema import Model

PIXEL_MEAN, PIXEL_STD = 0.5, 0.3
TAIL = ("image_tail", "image_projection", "image_head", "fused_head")
TEXT = ("text", "text_projection", "text_head")
_BINS = 8
# What a parameter of flax is called here; matrices are stored the other way round.
_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class Attention(nn.Module):
    """The first half of a block; `query` [B, Q, W] are all tokens that are wanted."""

    def __init__(self, width: int, heads: int):  # noqa: D107
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None, query=None):  # noqa: D102
        y = self.ln_1(x)
        if query is None:
            query, parts = x, self.qkv(y).chunk(3, dim=-1)
        else:
            # No query is made of tokens that nothing is wanted of, nor keys of queries.
            width = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(self.ln_1(query), weight[:width], bias[:width])
            parts = (q, *F.linear(y, weight[width:], bias[width:]).chunk(2, dim=-1))
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return query + self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The second half of a block: each token by itself."""

    def __init__(self, width: int):  # noqa: D107
        super().__init__()
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x):  # noqa: D102
        return x + self.proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class Block(nn.Module):
    """Attention, then a feed-forward layer."""

    def __init__(self, width: int, heads: int):  # noqa: D107
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width)

    def forward(self, x, mask=None, query=None):  # noqa: D102
        return self.feed_forward(self.attention(x, mask, query))


def pooled(x):
    """Class token and mean of the patches, [B, 2, W]."""
    return torch.stack([x[:, 0], x[:, 1:].mean(1)], dim=1)


def edge_histograms(x, cell: int):
    """Histograms of edge directions, [B, 8, S / cell, S / cell], of [B, 3, S, S]."""
    grey = F.pad(x.sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    dx = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
    dy = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    strength = torch.sqrt(dx * dx + dy * dy + 1e-6)
    angle = torch.arange(_BINS, device=x.device) * math.pi / _BINS
    angle = angle.to(x.dtype)[:, None, None]
    along = (dx * torch.cos(angle) + dy * torch.sin(angle)) / strength
    h = strength * along.square().square().square()
    return torch.sqrt(F.avg_pool2d(h, cell) * cell + 1e-6)


def _patches(x, side: int):
    """[B, C, S, S] cut into squares of `side`: [B, (S / side)^2, side * side * C]."""
    batch, channels, size, _ = x.shape
    cells = size // side
    x = x.reshape(batch, channels, cells, side, cells, side)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, cells * cells, -1)


class ImageTrunk(nn.Module):
    """Pictures [B, 3, S, S] in 0..1 to tokens, or to two where no block is left."""

    def __init__(self, config: Model, image_size: int):  # noqa: D107
        super().__init__()
        width = config.image_width
        self.patch, self.cell = config.patch, max(config.patch // 2, 1)
        edges = _BINS * (self.patch // self.cell) ** 2
        tokens = (image_size // self.patch) ** 2 + 1
        self.patches = nn.Linear(3 * self.patch**2 + edges, width, bias=False)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        whole = not config.tail_blocks
        self.depth = config.image_depth - config.tail_blocks - whole
        for i in range(self.depth):
            self.add_module(f"block_{i}", Block(width, config.heads))
        self.attention = Attention(width, config.heads) if whole else None

    def forward(self, image):  # noqa: D102
        x = (image - PIXEL_MEAN) / PIXEL_STD
        edges = _patches(edge_histograms(x, self.cell), self.patch // self.cell)
        x = self.patches(torch.cat([_patches(x, self.patch) / 2, edges], dim=-1))
        token = self.class_token.to(x.dtype).expand(len(x), -1, -1)
        x = self.ln_pre(torch.cat([token, x], dim=1) + self.position)
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        return x if self.attention is None else self.attention(x, query=pooled(x))


class ImageTail(nn.Module):
    """What the trunk gives to the picture's feature [B, W]."""

    def __init__(self, config: Model):  # noqa: D107
        super().__init__()
        self.depth = config.tail_blocks
        for i in range(self.depth):
            self.add_module(f"block_{i}", Block(config.image_width, config.heads))
        if not self.depth:
            self.feed_forward = FeedForward(config.image_width)
        self.ln_post = nn.LayerNorm(config.image_width, eps=1e-6)

    def forward(self, x):  # noqa: D102
        for i in range(self.depth):
            query = pooled(x) if i == self.depth - 1 else None
            x = getattr(self, f"block_{i}")(x, query=query)
        if not self.depth:
            x = self.feed_forward(x)
        return self.ln_post(x).mean(1).float()


class TextTower(nn.Module):
    """Token ids [B, T] to the text's feature [B, W]."""

    def __init__(self, config: Model, vocabulary: int, length: int):  # noqa: D107
        super().__init__()
        width = config.text_width
        self.tokens = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.depth = config.text_depth
        for i in range(self.depth):
            self.add_module(f"block_{i}", Block(width, config.heads))
        self.ln_final = nn.LayerNorm(width, eps=1e-6)

    def forward(self, text):  # noqa: D102
        there = (text > 0).float()
        x = self.tokens(text) + self.position
        # Added, not a mask of truths: a row of nothing but padding must stay finite.
        mask = ((there - 1) * 1e9)[:, None, None, :]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x, mask.to(x.dtype))
        weight = there / there.sum(1, keepdim=True).clamp(min=1)
        return (self.ln_final(x).float() * weight[..., None]).sum(1)


class FusedHead(nn.Module):
    """Logits [B, K] from both features, with a learned stand-in for a missing one."""

    def __init__(self, config: Model, classes: int):  # noqa: D107
        super().__init__()
        image, text = config.image_width, config.text_width
        self.no_image = nn.Parameter(torch.zeros(image))
        self.no_text = nn.Parameter(torch.zeros(text))
        self.ln_image = nn.LayerNorm(image, eps=1e-6)
        self.ln_text = nn.LayerNorm(text, eps=1e-6)
        self.fc = nn.Linear(image + text, text)
        self.deep = nn.Linear(text, classes)
        self.wide = nn.Linear(image + text, classes)

    def forward(self, h_image, h_text, has_image, has_text):  # noqa: D102
        image = torch.where(has_image[:, None], self.ln_image(h_image), self.no_image)
        text = torch.where(has_text[:, None], self.ln_text(h_text), self.no_text)
        both = torch.cat([image, text], dim=-1)
        hidden = F.gelu(self.fc(both), approximate="tanh")
        return self.deep(hidden) + self.wide(both)


class Classifier(nn.Module):
    """All parts, under the names of the parameter tree."""

    def __init__(  # noqa: D107
        self, config: Model, classes, vocabulary, image_size, text_length
    ):
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

    def _towers(self, device):
        # The heads compute in float32, as they do in flax.
        if self.dtype != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def features(self, image):
        """The picture's feature [B, W] before dropout, of [B, 3, S, S] in 0..1."""
        with self._towers(image.device):
            if self.dtype == "bfloat16":
                image = image.bfloat16()
            return self.image_tail(self.image_trunk(image))

    def behind(self, features):
        """The same of the trunk's features [B, P, W]."""
        with self._towers(features.device):
            return self.image_tail(features)

    def read(self, text):
        """The text's feature [B, W] before dropout."""
        with self._towers(text.device):
            return self.text(text)

    def heads(self, h_image, h_text, has_image, has_text):
        """Logits of the three views, and unit embeddings, by name."""
        return {
            "image": self.image_head(h_image),
            "text": self.text_head(h_text),
            "fused": self.fused_head(h_image, h_text, has_image, has_text),
            "z_image": unit(self.image_projection(h_image)),
            "z_text": unit(self.text_projection(h_text)),
        }


def unit(x):
    """Rows scaled to unit length."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-12)


def load(model: Classifier, params: dict[str, np.ndarray]) -> None:
    """Fill a classifier with the parameters of flax, named `part/module/.../leaf`.

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
            state[".".join([*path, _NAMES.get(leaf, leaf)])] = x
    # One product for queries, keys and values, as one writes it.
    for (path, leaf), x in queries.items():
        leaf = _NAMES.get(leaf, leaf)
        others = state.pop(".".join([*path, "key_value", leaf]))
        state[".".join([*path, "qkv", leaf])] = torch.cat([x, others])
    model.load_state_dict(state)
