"""The towers, as flax modules over a batch; blocks are shaped like CLIP's.

Letters: B rows, P picture tokens, T text tokens, W width, K classes, D shared space.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

# Zero-mean, unit-variance pixels for pictures whose mean and spread are near these.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.3


class Attention(nn.Module):
    """The first half of a pre-norm transformer block: tokens look at each other.

    Args of the call: `x_BxTxW`, `mask_BxT` (true where a token may be looked at), and
    `query_BxQxW`: tokens that look at x and are all that is wanted, instead of x.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxTxW, mask_BxT=None, query_BxQxW=None):  # noqa: D102
        batch, _, width = x_BxTxW.shape
        if query_BxQxW is None:
            query_BxQxW = x_BxTxW
        # All but attention works on single tokens: as a matrix, XLA's CPU backend takes
        # the products in two thirds of the time that it needs for three axes.
        x_NxW = einops.rearrange(x_BxTxW, "b t w -> (b t) w")
        query_NxW = einops.rearrange(query_BxQxW, "b q w -> (b q) w")
        norm = nn.LayerNorm(dtype=self.dtype, name="ln_1")
        heads = dict(b=batch, h=self.heads)
        query = nn.Dense(width, dtype=self.dtype, name="query")(norm(query_NxW))
        query = einops.rearrange(query, "(b q) (h d) -> b q h d", **heads)
        both = nn.Dense(2 * width, dtype=self.dtype, name="key_value")(norm(x_NxW))
        cut = "(b t) (two h d) -> two b t h d"
        key, value = einops.rearrange(both, cut, two=2, **heads)
        mixed = attend(query, key, value, mask_BxT)
        mixed = einops.rearrange(mixed, "b h q d -> (b q) (h d)")
        out = query_NxW + _near_zero(width, self.dtype, "out")(mixed)
        return einops.rearrange(out, "(b q) w -> b q w", b=batch)


def attend(query_BxQxHxD, key_BxTxHxD, value_BxTxHxD, mask_BxT=None):
    """Attention (Vaswani et al. 2017) of H heads: `[B, H, Q, D]`.

    The softmax is divided by its sum only behind the last product, as in flash
    attention (Dao et al. 2022): on CPUs a quarter less time, there and back.
    """
    query = query_BxQxHxD * query_BxQxHxD.shape[-1] ** -0.5
    score_BxHxQxT = jnp.einsum(
        "bqhd,bthd->bhqt", query, key_BxTxHxD, preferred_element_type=jnp.float32
    )
    if mask_BxT is not None:
        # Large and finite: a row of -inf would turn the softmax into NaN.
        score_BxHxQxT += jnp.where(mask_BxT, 0.0, -1e9)[:, None, None, :]
    largest = jax.lax.stop_gradient(score_BxHxQxT.max(axis=-1, keepdims=True))
    weight_BxHxQxT = jnp.exp(score_BxHxQxT - largest)
    mixed_BxHxQxD = jnp.einsum(
        "bhqt,bthd->bhqd",
        weight_BxHxQxT.astype(value_BxTxHxD.dtype),
        value_BxTxHxD,
        preferred_element_type=jnp.float32,
    )
    total = weight_BxHxQxT.sum(axis=-1, keepdims=True)
    return (mixed_BxHxQxD / total).astype(value_BxTxHxD.dtype)


class FeedForward(nn.Module):
    """The second half of a block: each token `[B, T, W]` by itself."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxTxW):  # noqa: D102
        batch, _, width = x_BxTxW.shape
        x_NxW = einops.rearrange(x_BxTxW, "b t w -> (b t) w")
        y = nn.LayerNorm(dtype=self.dtype, name="ln_2")(x_NxW)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="fc")(y))
        x_NxW = x_NxW + _near_zero(width, self.dtype, "proj")(y)
        return einops.rearrange(x_NxW, "(b t) w -> b t w", b=batch)


def _near_zero(width, dtype, name):
    # Blocks start near the identity: little data then keeps what it need not change.
    small = nn.initializers.normal(0.02)
    return nn.Dense(width, dtype=dtype, kernel_init=small, name=name)


class Block(nn.Module):
    """One pre-norm transformer block: attention, then a feed-forward layer."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxTxW, mask_BxT=None, query_BxQxW=None):  # noqa: D102
        look = Attention(self.heads, self.dtype, name="attention")
        x_BxTxW = look(x_BxTxW, mask_BxT, query_BxQxW)
        return FeedForward(self.dtype, name="feed_forward")(x_BxTxW)


def _block(remat):
    """A block; `remat`: computed once more for the gradient instead of being kept."""
    return nn.remat(Block) if remat else Block


def pooled(x_BxPxW):
    """Class token and mean of the patches `[B, 2, W]`: they see different things.

    Small models trained from scratch need the mean.
    """
    mean = x_BxPxW[:, 1:].mean(axis=1, keepdims=True)
    return jnp.concatenate([x_BxPxW[:, :1], mean], axis=1)


def edge_histograms(x, cell: int, bins: int = 8):
    """Histograms of edge directions of `[B, S, S, 3]` in cells of `cell` pixels.

    A fixed, differentiable description of shape (Dalal & Triggs 2005): with a thousand
    pictures to learn from, a transformer does not find edges by itself.

    Returns:
        `[B, S / cell, S / cell, bins]`, square roots of the summed strengths.
    """
    grey = jnp.pad(x.sum(-1), ((0, 0), (1, 1), (1, 1)), mode="edge")
    dx = (grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2])[:, None]
    dy = (grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1])[:, None]
    strength = jnp.sqrt(dx * dx + dy * dy + 1e-6)
    # The projections onto fixed directions need no arctangent.
    angle = (jnp.arange(bins) * jnp.pi / bins).astype(x.dtype)[:, None, None]
    along = (dx * jnp.cos(angle) + dy * jnp.sin(angle)) / strength
    h = strength * along**bins
    # Sums along a row as a product with a matrix: CPUs are slow at short sums.
    side = x.shape[1] // cell
    cells = jnp.repeat(jnp.eye(side, dtype=x.dtype), cell, axis=0)
    h = einops.reduce(h @ cells, "b k (h p) w -> b h w k", "sum", p=cell)
    return jnp.sqrt(h / cell + 1e-6)


class ImageTrunk(nn.Module):
    """Pictures `[B, S, S, 3]` (floats in 0..1) to tokens `[B, P, W]`.

    With `whole`, to the two tokens `[B, 2, W]` that the last block's feed-forward layer
    gets: it does all but that layer, and stores little for each picture.

    Patches are cut by a reshape and embedded by one matrix product: on CPUs this is far
    faster than a strided convolution, and inside a scan by an order of magnitude.
    """

    patch: int
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype
    whole: bool = False
    remat: bool = False

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
        for i in range(self.depth - self.whole):
            x = _block(self.remat)(self.heads, self.dtype, name=f"block_{i}")(x)
        if self.whole:
            x = Attention(self.heads, self.dtype, name="attention")(
                x, query_BxQxW=pooled(x)
            )
        return x


class ImageTail(nn.Module):
    """What the trunk gives, to the picture's feature `[B, W]`: last blocks, norm, pool.

    Nothing but two pooled tokens is wanted of the last block, so nothing else is
    computed: it takes a fifth of a full block's time. With `depth` 0 the trunk has
    done even that, and what is left is the last feed-forward layer.
    """

    depth: int
    heads: int
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, x_BxPxW):  # noqa: D102
        block = _block(self.remat)
        for i in range(self.depth):
            query = pooled(x_BxPxW) if i == self.depth - 1 else None
            x_BxPxW = block(self.heads, self.dtype, name=f"block_{i}")(
                x_BxPxW, None, query
            )
        if not self.depth:
            x_BxPxW = FeedForward(self.dtype, name="feed_forward")(x_BxPxW)
        x_BxPxW = nn.LayerNorm(dtype=self.dtype, name="ln_post")(x_BxPxW)
        return x_BxPxW.mean(axis=1).astype(jnp.float32)


class TextTower(nn.Module):
    """Token ids `[B, T]` (0 = padding) to the text's feature `[B, W]`."""

    vocabulary: int
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype
    remat: bool = False

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
            block = _block(self.remat)(self.heads, self.dtype, name=f"block_{i}")
            x = block(x, mask_BxT)
        x = nn.LayerNorm(dtype=self.dtype, name="ln_final")(x)
        weight_BxT = mask_BxT / jnp.maximum(mask_BxT.sum(1, keepdims=True), 1)
        return jnp.einsum("btw,bt->bw", x.astype(jnp.float32), weight_BxT)
