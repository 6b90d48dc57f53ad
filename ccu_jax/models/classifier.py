"""The image+text classifier as pure functions of a parameter tree.

`build` returns a `Model`. Parameters are a dict of named parts, so that a method can
say in one tuple what it trains (`TAIL`) and what it leaves alone to the bit (the rest).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ccu_jax.config import schema
from ccu_jax.errors import UserError
from ccu_jax.models import towers

Params = dict[str, Any]
Example = dict[str, jax.Array]

# The parts of the picture's way behind the trunk: what the cached features feed.
TAIL = ("image_tail", "image_projection", "image_head", "fused_head")
TEXT = ("text", "text_projection", "text_head")
VIEWS = ("image", "text", "fused")
VISUAL = ("image", "fused")  # those that see the picture


class Outputs(NamedTuple):
    """What the classifier says of `B` rows.

    `z_image`, `z_text`: unit embeddings `[B, D]` in the shared space; `h_image`,
    `h_text`: features `[B, W]`; `h_fused`: what the fused logits are read off `[B, F]`;
    `image`, `text`, `fused`: logits `[B, K]` of each view.
    """

    z_image: jax.Array
    z_text: jax.Array
    h_image: jax.Array
    h_text: jax.Array
    h_fused: jax.Array
    image: jax.Array
    text: jax.Array
    fused: jax.Array


class Model(NamedTuple):
    """A classifier.

    `init(key)`, `trunk(params, image)`, `read(params, text)`, `apply(params, example)`.
    """

    init: Callable[[jax.Array], Params]
    trunk: Callable[[Params, jax.Array], jax.Array]
    read: Callable[[Params, jax.Array], jax.Array]
    apply: Callable[..., Outputs]


def unit(x: jax.Array) -> jax.Array:
    """Rows scaled to unit length; zeros stay zero and have a finite gradient."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class FusedHead(nn.Module):
    """Logits `[B, K]` from both features, and all `[B, F]` that they are read off.

    A learned stand-in takes the place of a missing one.
    """

    classes: int
    width: int

    @nn.compact
    def __call__(self, h_image, h_text, has_image, has_text):  # noqa: D102
        parts = []
        for name, h, has in (
            ("image", h_image, has_image),
            ("text", h_text, has_text),
        ):
            absent = self.param(
                f"no_{name}", nn.initializers.normal(0.02), (h.shape[-1],)
            )
            h = nn.LayerNorm(name=f"ln_{name}")(h)
            parts.append(jnp.where(has[:, None], h, absent))
        both = jnp.concatenate(parts, axis=-1)
        hidden = nn.gelu(nn.Dense(self.width, name="fc")(both))
        deep = nn.Dense(self.classes, name="deep")(hidden)
        logits = deep + nn.Dense(self.classes, name="wide")(both)
        return logits, jnp.concatenate([both, hidden], axis=-1)


def build(
    config: schema.Model,
    *,
    classes: int,
    vocabulary: int,
    image_size: int,
    text_length: int,
) -> Model:
    """Build the classifier.

    Args:
        config: sizes.
        classes: K, number of labels.
        vocabulary: number of token ids, padding included.
        image_size: side of the pictures in pixels; a multiple of `config.patch`.

    Raises:
        UserError: sizes that do not fit each other.
    """
    _check(config, image_size)
    parts = _modules(config, classes, vocabulary)

    def run(params, part, *inputs):
        return parts[part].apply({"params": params[part]}, *inputs)

    def trunk(params: Params, image: jax.Array) -> jax.Array:
        """Trunk features `[B, P or 2, W]` of pictures `[B, S, S, 3]`, uint8 or 0..1."""
        if image.dtype == jnp.uint8:
            image = image / 255.0
        return run(params, "image_trunk", image)

    def read(params: Params, text: jax.Array) -> jax.Array:
        """Features `[B, W]` of texts `[B, T]`."""
        return run(params, "text", text)

    def apply(params: Params, example: Example, *, keys=None, drop=True) -> Outputs:
        """Outputs for a batch.

        Args:
            params: the parts.
            example: `image` or its trunk `features`; `text` or its feature `h_text`;
                `has_image`, `has_text` `[B]`: what the fused view may look at.
            keys: one random key per row switches dropout on the features on. Keys
                belong to rows, not devices, so that results do not depend on how many
                devices share the batch.
            drop: which rows have dropout, `[B]`.
        """
        c = (
            example["features"]
            if "features" in example
            else trunk(params, example["image"])
        )
        h_image = run(params, "image_tail", c)
        h_text = (
            example["h_text"] if "h_text" in example else read(params, example["text"])
        )
        if keys is not None and config.dropout:
            h_image, h_text = _dropout(h_image, h_text, keys, drop, config.dropout)
        fused, h_fused = run(
            params,
            "fused_head",
            h_image,
            h_text,
            example["has_image"],
            example["has_text"],
        )
        return Outputs(
            z_image=unit(run(params, "image_projection", h_image)),
            z_text=unit(run(params, "text_projection", h_text)),
            h_image=h_image,
            h_text=h_text,
            h_fused=h_fused,
            image=run(params, "image_head", h_image),
            text=run(params, "text_head", h_text),
            fused=fused,
        )

    def init(key: jax.Array) -> Params:
        inputs = _inputs(config, image_size, text_length)
        return {
            name: parts[name].init(jax.random.fold_in(key, i), *inputs[name])["params"]
            for i, name in enumerate(sorted(parts))
        }

    # It runs once: on CPUs, making it fast would take far longer than it does.
    on_cpu = jax.default_backend() == "cpu"
    quick = {"xla_backend_optimization_level": 0} if on_cpu else None
    return Model(
        init=jax.jit(init, compiler_options=quick), trunk=trunk, read=read, apply=apply
    )


def _modules(config, classes, vocabulary) -> dict[str, nn.Module]:
    shape = dict(heads=config.heads, dtype=jnp.dtype(config.dtype))
    shape["remat"] = config.remat
    trunk_depth = config.image_depth - config.tail_blocks
    return {
        "image_trunk": towers.ImageTrunk(
            config.patch,
            config.image_width,
            trunk_depth,
            whole=not config.tail_blocks,
            **shape,
        ),
        "image_tail": towers.ImageTail(config.tail_blocks, **shape),
        "text": towers.TextTower(
            vocabulary, config.text_width, config.text_depth, **shape
        ),
        "image_projection": nn.Dense(config.embed_dim, use_bias=False),
        "text_projection": nn.Dense(config.embed_dim, use_bias=False),
        "image_head": nn.Dense(classes),
        "text_head": nn.Dense(classes),
        "fused_head": FusedHead(classes, config.text_width),
    }


def _inputs(config, image_size, text_length) -> dict[str, tuple]:
    """What each part is called with, one row: its shapes make the parameters."""
    h_image = jnp.zeros((1, config.image_width))
    h_text = jnp.zeros((1, config.text_width))
    has = jnp.ones((1,), bool)
    return {
        "image_trunk": (jnp.zeros((1, image_size, image_size, 3)),),
        "image_tail": (jnp.zeros((1, 2, config.image_width)),),
        "text": (jnp.zeros((1, text_length), jnp.int32),),
        "image_projection": (h_image,),
        "text_projection": (h_text,),
        "image_head": (h_image,),
        "text_head": (h_text,),
        "fused_head": (h_image, h_text, has, has),
    }


def _dropout(h_image, h_text, keys, drop, rate):
    both = jnp.concatenate([h_image, h_text], axis=1)
    shape = both.shape[1:]
    # The key itself has drawn the augmentation.
    draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), shape))
    rate = jnp.where(jnp.broadcast_to(drop, len(both)), rate, 0.0)[:, None]
    both = jnp.where(draw(keys) < rate, 0.0, both / (1 - rate))
    return jnp.split(both, [h_image.shape[1]], axis=1)


def _check(config, image_size):
    if image_size % config.patch:
        raise UserError(
            f"data.image_size={image_size} is not a multiple of model.patch="
            f"{config.patch}: change one of them"
        )
    if config.patch > 3 and config.patch % 2:
        raise UserError(
            f"model.patch={config.patch} is odd: edges are looked at in halves of a "
            "patch; give an even number"
        )
    for tower in ("image", "text"):
        width = getattr(config, f"{tower}_width")
        if width % config.heads:
            raise UserError(
                f"model.{tower}_width={width} is not a multiple of model.heads="
                f"{config.heads}: change one of them"
            )
    if not 0 <= config.tail_blocks <= config.image_depth:
        raise UserError(
            f"model.tail_blocks={config.tail_blocks} must lie between 0 and "
            f"model.image_depth={config.image_depth}"
        )
