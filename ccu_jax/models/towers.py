"""The towers, as flax modules over a batch; blocks are shaped like CLIP's.

Letters: B rows, P picture tokens, T text tokens, W width, K classes, D shared space.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

# Zero-mean, unit-variance pixels for pictures whose mean and spread are near these.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.3


class Block(nn.Module):
    """One pre-norm transformer block: attention, then a feed-forward layer.

    Args of the call: `x_BxTxW`, `mask_BxT` (true where a token may be looked at), and
    `query_BxQxW`: tokens that look at x and are all that is wanted, instead of x.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxTxW, mask_BxT=None, query_BxQxW=None):  # noqa: D102
        batch, _, width = x_BxTxW.shape
        # Blocks start near the identity: little data then keeps what it need not
        # change.
        small = nn.initializers.normal(0.02)
        tokens = x_BxTxW.shape[1]
        if query_BxQxW is not None:
            x_BxTxW = jnp.concatenate([x_BxTxW, query_BxQxW], axis=1)
        # All but attention works on single tokens: as a matrix, XLA's CPU backend takes
        # the products in two thirds of the time that it needs for three axes.
        x_NxW = einops.rearrange(x_BxTxW, "b t w -> (b t) w")
        y = nn.LayerNorm(dtype=self.dtype, name="ln_1")(x_NxW)
        query, key, value = einops.rearrange(
            nn.Dense(3 * width, dtype=self.dtype, name="qkv")(y),
            "(b t) (three h d) -> three b t h d",
            b=batch,
            three=3,
            h=self.heads,
        )
        if query_BxQxW is not None:
            x_NxW = einops.rearrange(query_BxQxW, "b q w -> (b q) w")
            query, key, value = query[:, tokens:], key[:, :tokens], value[:, :tokens]
        bias = None
        if mask_BxT is not None:
            # Large and finite: a row of -inf would turn the softmax into NaN.
            bias = jnp.where(mask_BxT, 0.0, -1e9)[:, None, None, :].astype(self.dtype)
        mixed = jax.nn.dot_product_attention(query, key, value, bias=bias)
        mixed = einops.rearrange(mixed, "b t h d -> (b t) (h d)")
        x_NxW = x_NxW + nn.Dense(
            width, dtype=self.dtype, kernel_init=small, name="out"
        )(mixed)
        y = nn.LayerNorm(dtype=self.dtype, name="ln_2")(x_NxW)
        y = nn.Dense(4 * width, dtype=self.dtype, name="fc")(y)
        y = nn.Dense(width, dtype=self.dtype, kernel_init=small, name="proj")(
            nn.gelu(y)
        )
        return einops.rearrange(x_NxW + y, "(b t) w -> b t w", b=batch)


def edge_histograms(x, cell: int, bins: int = 8):
    """Histograms of edge directions of `[B, S, S, 3]` in cells of `cell` pixels.

    A fixed, differentiable description of shape (Dalal & Triggs 2005): with a thousand
    pictures to learn from, a transformer does not find edges by itself.

    Returns:
        `[B, S / cell, S / cell, bins]`, square roots of the summed strengths.
    """
    y = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    dx = (y[:, 1:-1, 2:] - y[:, 1:-1, :-2]).sum(-1)
    dy = (y[:, 2:, 1:-1] - y[:, :-2, 1:-1]).sum(-1)
    strength = jnp.sqrt(dx * dx + dy * dy + 1e-6)
    # The projections onto fixed directions need no arctangent.
    angle = jnp.arange(bins) * jnp.pi / bins
    along = jnp.abs(dx[..., None] * jnp.cos(angle) + dy[..., None] * jnp.sin(angle))
    share = (along / strength[..., None]) ** bins
    h = strength[..., None] * share
    h = einops.reduce(h, "b (h p) (w q) k -> b h w k", "sum", p=cell, q=cell)
    return jnp.sqrt(h / cell + 1e-6)


class ImageTrunk(nn.Module):
    """Pictures `[B, S, S, 3]` (floats in 0..1) to tokens `[B, P, W]`.

    Patches are cut by a reshape and embedded by one matrix product: on CPUs this is far
    faster than a strided convolution, and inside a scan by an order of magnitude.
    """

    patch: int
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image_BxSxSx3):  # noqa: D102
        x = (image_BxSxSx3.astype(self.dtype) - PIXEL_MEAN) / PIXEL_STD
        cut = "b (h p) (w q) c -> b (h w) (p q c)"
        patches = einops.rearrange(x, cut, p=self.patch, q=self.patch)
        cell = max(self.patch // 2, 1)
        per_patch = self.patch // cell
        edges = edge_histograms(x, cell)
        edges = einops.rearrange(edges, cut, p=per_patch, q=per_patch)
        x = jnp.concatenate([patches / 2, edges], axis=-1)
        x = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="patches")(x)
        small = nn.initializers.normal(0.02)
        token = self.param("class_token", small, (1, 1, self.width))
        token = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
        x = jnp.concatenate([token.astype(self.dtype), x], axis=1)
        x = x + self.param("position", small, x.shape[1:]).astype(self.dtype)
        x = nn.LayerNorm(dtype=self.dtype, name="ln_pre")(x)
        for i in range(self.depth):
            x = Block(self.heads, self.dtype, name=f"block_{i}")(x)
        return x


class ImageTail(nn.Module):
    """Tokens `[B, P, W]` to the picture's feature `[B, W]`: last blocks, pool, norm.

    The class token and the mean of the patches see different things; small models
    trained from scratch need the mean. Nothing else is wanted of the last block, so
    nothing else is computed: it takes a fifth of a full block's time.
    """

    depth: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxPxW):  # noqa: D102
        for i in range(self.depth - 1):
            x_BxPxW = Block(self.heads, self.dtype, name=f"block_{i}")(x_BxPxW)
        mean = x_BxPxW[:, 1:].mean(axis=1, keepdims=True)
        pooled = jnp.concatenate([x_BxPxW[:, :1], mean], axis=1)
        if self.depth:
            last = Block(self.heads, self.dtype, name=f"block_{self.depth - 1}")
            pooled = last(x_BxPxW, query_BxQxW=pooled)
        pooled = nn.LayerNorm(dtype=self.dtype, name="ln_post")(pooled)
        return pooled.mean(axis=1).astype(jnp.float32)


class TextTower(nn.Module):
    """Token ids `[B, T]` (0 = padding) to the text's feature `[B, W]`."""

    vocabulary: int
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, text_BxT):  # noqa: D102
        mask_BxT = text_BxT > 0
        x = nn.Embed(
            self.vocabulary,
            self.width,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            name="tokens",
        )(text_BxT)
        position = self.param(
            "position", nn.initializers.normal(0.01), (x.shape[1], self.width)
        )
        x = x + position.astype(self.dtype)
        for i in range(self.depth):
            x = Block(self.heads, self.dtype, name=f"block_{i}")(x, mask_BxT)
        x = nn.LayerNorm(dtype=self.dtype, name="ln_final")(x)
        weight_BxT = mask_BxT / jnp.maximum(mask_BxT.sum(1, keepdims=True), 1)
        return jnp.einsum("btw,bt->bw", x.astype(jnp.float32), weight_BxT)
