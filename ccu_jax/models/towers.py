"""The image and text towers as Flax modules, with transformer blocks like CLIP's.

Letters: B rows, P image tokens, T text tokens, Q queries, H heads, N = B * T tokens of
a batch, W width.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

# Typical mean and standard deviation of pixels in [0, 1], to normalize images.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.3


class Attention(nn.Module):
    """The first half of a pre-norm transformer block: multi-head attention.

    The inputs are tokens `x_BxTxW`; `mask_BxT`, false for padding; and optionally
    `query_BxQxW`, tokens that attend to x and are returned instead of x.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x_BxTxW: jax.Array,
        mask_BxT: jax.Array | None = None,
        query_BxQxW: jax.Array | None = None,
    ) -> jax.Array:
        """Returns tokens `[B, Q, W]`, or `[B, T, W]` without queries."""
        batch, _, width = x_BxTxW.shape
        if query_BxQxW is None:
            query_BxQxW = x_BxTxW
        # Only attention mixes tokens, so the Dense layers get 2-D arrays: on CPUs, XLA
        # multiplies them in two thirds of the time of 3-D arrays.
        x_NxW = einops.rearrange(x_BxTxW, "b t w -> (b t) w")
        query_NxW = einops.rearrange(query_BxQxW, "b q w -> (b q) w")
        norm = nn.LayerNorm(dtype=self.dtype, name="ln_1")
        sizes = {"b": batch, "h": self.heads}
        query = nn.Dense(width, dtype=self.dtype, name="query")(norm(query_NxW))
        query = einops.rearrange(query, "(b q) (h d) -> b q h d", **sizes)
        key_value = nn.Dense(2 * width, dtype=self.dtype, name="key_value")(norm(x_NxW))
        key, value = einops.rearrange(
            key_value, "(b t) (two h d) -> two b t h d", two=2, **sizes
        )
        mixed = attend(query, key, value, mask_BxT)
        mixed = einops.rearrange(mixed, "b h q d -> (b q) (h d)")
        out = query_NxW + _residual_dense(width, self.dtype, "out")(mixed)
        return einops.rearrange(out, "(b q) w -> b q w", b=batch)


def attend(
    query_BxQxHxD: jax.Array,
    key_BxTxHxD: jax.Array,
    value_BxTxHxD: jax.Array,
    mask_BxT: jax.Array | None = None,
) -> jax.Array:
    """Returns scaled dot-product attention (Vaswani et al. 2017), `[B, H, Q, D]`.

        softmax(query . key / sqrt(D)) value

    The softmax is normalized after the product with the values, as in flash attention
    (Dao et al. 2022): on CPUs this saves a quarter of the time of a training step.
    """
    query = query_BxQxHxD * query_BxQxHxD.shape[-1] ** -0.5
    score_BxHxQxT = jnp.einsum(
        "bqhd,bthd->bhqt", query, key_BxTxHxD, preferred_element_type=jnp.float32
    )
    if mask_BxT is not None:
        # Large but finite, because the softmax of a row of -inf is NaN.
        score_BxHxQxT += jnp.where(mask_BxT, 0.0, -1e9)[:, None, None, :]
    max_score = jax.lax.stop_gradient(score_BxHxQxT.max(axis=-1, keepdims=True))
    weight_BxHxQxT = jnp.exp(score_BxHxQxT - max_score)
    mixed_BxHxQxD = jnp.einsum(
        "bhqt,bthd->bhqd",
        weight_BxHxQxT.astype(value_BxTxHxD.dtype),
        value_BxTxHxD,
        preferred_element_type=jnp.float32,
    )
    total = weight_BxHxQxT.sum(axis=-1, keepdims=True)
    return (mixed_BxHxQxD / total).astype(value_BxTxHxD.dtype)


class FeedForward(nn.Module):
    """The second half of a block: a feed-forward layer on each token `[B, T, W]`."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxTxW: jax.Array) -> jax.Array:
        """Returns tokens of the same shape."""
        batch, _, width = x_BxTxW.shape
        x_NxW = einops.rearrange(x_BxTxW, "b t w -> (b t) w")
        y = nn.LayerNorm(dtype=self.dtype, name="ln_2")(x_NxW)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="fc")(y))
        x_NxW = x_NxW + _residual_dense(width, self.dtype, "proj")(y)
        return einops.rearrange(x_NxW, "(b t) w -> b t w", b=batch)


def _residual_dense(width, dtype, name):
    # With small weights, blocks start near the identity, which helps on small data.
    kernel_init = nn.initializers.normal(0.02)
    return nn.Dense(width, dtype=dtype, kernel_init=kernel_init, name=name)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a feed-forward layer."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x_BxTxW: jax.Array,
        mask_BxT: jax.Array | None = None,
        query_BxQxW: jax.Array | None = None,
    ) -> jax.Array:
        """Returns tokens, as `Attention` does."""
        attention = Attention(self.heads, self.dtype, name="attention")
        x_BxTxW = attention(x_BxTxW, mask_BxT, query_BxQxW)
        return FeedForward(self.dtype, name="feed_forward")(x_BxTxW)


def _make_block(tower, index):
    """Returns a block of a tower, rematerialized in the backward pass if `remat`."""
    block = nn.remat(Block) if tower.remat else Block
    return block(tower.heads, tower.dtype, name=f"block_{index}")


def pool_class_and_mean(x_BxPxW: jax.Array) -> jax.Array:
    """Returns the class token and the mean of the image tokens, `[B, 2, W]`.

    Small models trained from scratch need the mean.
    """
    mean = x_BxPxW[:, 1:].mean(axis=1, keepdims=True)
    return jnp.concatenate([x_BxPxW[:, :1], mean], axis=1)


def edge_histograms(x: jax.Array, cell: int, bins: int = 8) -> jax.Array:
    """Returns histograms of edge orientations, similar to HOG (Dalal & Triggs 2005).

    They are fixed, differentiable shape features: with a thousand training images, a
    transformer does not learn to detect edges. From images `[B, S, S, 3]`, with `bins`
    orientations and square cells of `cell` pixels per side, a divisor of S, it computes
    square roots of the summed gradient magnitudes, `[B, S / cell, S / cell, bins]`.
    """
    gray = jnp.pad(x.sum(-1), ((0, 0), (1, 1), (1, 1)), mode="edge")
    dx = (gray[:, 1:-1, 2:] - gray[:, 1:-1, :-2])[:, None]
    dy = (gray[:, 2:, 1:-1] - gray[:, :-2, 1:-1])[:, None]
    magnitude = jnp.sqrt(dx * dx + dy * dy + 1e-6)
    # Projecting onto fixed orientations avoids the arctangent.
    angle = (jnp.arange(bins) * jnp.pi / bins).astype(x.dtype)[:, None, None]
    cosine = (dx * jnp.cos(angle) + dy * jnp.sin(angle)) / magnitude
    h = magnitude * cosine**bins
    # Sums along a row as a matrix product, because short sums are slow on CPUs.
    num_cells = x.shape[1] // cell
    cells = jnp.repeat(jnp.eye(num_cells, dtype=x.dtype), cell, axis=0)
    h = einops.reduce(h @ cells, "b k (h p) w -> b h w k", "sum", p=cell)
    return jnp.sqrt(h / cell + 1e-6)


class ImageTrunk(nn.Module):
    """Encodes images `[B, S, S, 3]` (floats in [0, 1]) as tokens `[B, P, W]`.

    With `returns_pooled`, the last block ends after attention and returns two pooled
    tokens `[B, 2, W]`, which saves storage; the tail runs the feed-forward layer.

    Patches are extracted by a reshape and embedded by one matrix product: on CPUs this
    is faster than a strided convolution, and ten times faster inside a scan.
    """

    patch: int
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype
    returns_pooled: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, image_BxSxSx3: jax.Array) -> jax.Array:
        """Returns tokens, two per image if `returns_pooled`."""
        x = (image_BxSxSx3.astype(self.dtype) - PIXEL_MEAN) / PIXEL_STD
        to_patches = "b (h p) (w q) c -> b (h w) (p q c)"
        patches = einops.rearrange(x, to_patches, p=self.patch, q=self.patch)
        cell = max(self.patch // 2, 1)
        cells = self.patch // cell  # per patch and axis
        edges = edge_histograms(x, cell)
        edges = einops.rearrange(edges, to_patches, p=cells, q=cells)
        x = jnp.concatenate([patches / 2, edges], axis=-1)
        x = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="patches")(x)
        small = nn.initializers.normal(0.02)
        token = self.param("class_token", small, (1, 1, self.width))
        token = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
        x = jnp.concatenate([token.astype(self.dtype), x], axis=1)
        x = x + self.param("position", small, x.shape[1:]).astype(self.dtype)
        x = nn.LayerNorm(dtype=self.dtype, name="ln_pre")(x)
        for i in range(self.depth - self.returns_pooled):
            x = _make_block(self, i)(x)
        if self.returns_pooled:
            attention = Attention(self.heads, self.dtype, name="attention")
            x = attention(x, query_BxQxW=pool_class_and_mean(x))
        return x


class ImageTail(nn.Module):
    """Maps the trunk's tokens to the image feature `[B, W]`: blocks, norm, and mean.

    The last block computes only the two pooled tokens, in a fifth of a full block's
    time. With `depth` 0, the tail is the feed-forward layer that a pooled trunk omits.
    """

    depth: int
    heads: int
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, x_BxPxW: jax.Array) -> jax.Array:
        """Returns image features `[B, W]`."""
        for i in range(self.depth):
            query = pool_class_and_mean(x_BxPxW) if i == self.depth - 1 else None
            x_BxPxW = _make_block(self, i)(x_BxPxW, None, query)
        if not self.depth:
            x_BxPxW = FeedForward(self.dtype, name="feed_forward")(x_BxPxW)
        x_BxPxW = nn.LayerNorm(dtype=self.dtype, name="ln_post")(x_BxPxW)
        return x_BxPxW.mean(axis=1).astype(jnp.float32)


class TextTower(nn.Module):
    """Encodes token ids `[B, T]` (0 = padding) as the text feature `[B, W]`."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, text_BxT: jax.Array) -> jax.Array:
        """Returns text features: the mean of the tokens that are not padding."""
        mask_BxT = text_BxT > 0
        small, tiny = nn.initializers.normal(0.02), nn.initializers.normal(0.01)
        x = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=small,
            dtype=self.dtype,
            name="tokens",
        )(text_BxT)
        position = self.param("position", tiny, (x.shape[1], self.width))
        x = x + position.astype(self.dtype)
        for i in range(self.depth):
            x = _make_block(self, i)(x, mask_BxT)
        x = nn.LayerNorm(dtype=self.dtype, name="ln_final")(x)
        weight_BxT = mask_BxT / jnp.maximum(mask_BxT.sum(1, keepdims=True), 1)
        return jnp.einsum("btw,bt->bw", x.astype(jnp.float32), weight_BxT)
