"""The image-text classifier as pure functions of its parameters.

Parameters are a dict with an entry per module, so that a method can name the modules
that it trains (such as `TAIL`) and leave all others bitwise unchanged.
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

# The modules that process the trunk's output, which is cached as features.
TAIL = ("image_tail", "image_projection", "image_head", "fused_head")
TEXT = ("text", "text_projection", "text_head")
VIEWS = ("image", "text", "fused")
VISUAL = ("image", "fused")  # the views that see the image


class Outputs(NamedTuple):
    """The classifier's outputs for B rows."""

    z_image: jax.Array  # unit embeddings [B, D] in a space shared with the text
    z_text: jax.Array
    h_image: jax.Array  # features [B, W] of each tower
    h_text: jax.Array
    h_fused: jax.Array  # features [B, F] that the fused head's output layers read
    image: jax.Array  # logits [B, K] of each view
    text: jax.Array
    fused: jax.Array


class Model(NamedTuple):
    """A classifier as pure functions.

    `trunk` maps images `[B, S, S, 3]`, uint8 or float in [0, 1], to features
    `[B, P or 2, W]`, and `encode_text` maps token ids `[B, T]` to `h_text` `[B, W]`.
    """

    init: Callable[[jax.Array], Params]  # from a random key
    trunk: Callable[[Params, jax.Array], jax.Array]
    encode_text: Callable[[Params, jax.Array], jax.Array]
    apply: Callable[..., Outputs]  # see `build`


def l2_normalize(x: jax.Array) -> jax.Array:
    """Scales rows to unit length; zeros stay zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class FusedHead(nn.Module):
    """Computes logits from the features of both towers with a residual MLP.

    Learned vectors replace missing modalities.
    """

    num_classes: int
    width: int

    @nn.compact
    def __call__(
        self,
        h_image: jax.Array,
        h_text: jax.Array,
        has_image: jax.Array,
        has_text: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns logits `[B, K]` and features `[B, F]`, the output layers' inputs."""
        inputs, small = [], nn.initializers.normal(0.02)
        modalities = (("image", h_image, has_image), ("text", h_text, has_text))
        for name, h, has in modalities:
            absent = self.param(f"no_{name}", small, (h.shape[-1],))
            h = nn.LayerNorm(name=f"ln_{name}")(h)
            inputs.append(jnp.where(has[:, None], h, absent))
        both = jnp.concatenate(inputs, axis=-1)
        hidden = nn.gelu(nn.Dense(self.width, name="fc")(both))
        deep = nn.Dense(self.num_classes, name="deep")(hidden)
        logits = deep + nn.Dense(self.num_classes, name="wide")(both)
        return logits, jnp.concatenate([both, hidden], axis=-1)


def build(
    config: schema.Model,
    *,
    num_classes: int,
    vocab_size: int,
    image_size: int,
    text_length: int,
) -> Model:
    """Builds the classifier.

    In the returned `apply(params, example, keys, use_dropout)`, `example` has the
    columns `image` or the trunk's `features`, `text` or `h_text`, and `has_image` and
    `has_text` `[B]`, the modalities that the fused view sees. With `keys`, a random key
    per row, dropout applies to features of rows with `use_dropout` (bool `[B]`).

    Raises UserError if the sizes in the configuration are incompatible.
    """
    _check_sizes(config, image_size)
    modules, rate = _make_modules(config, num_classes, vocab_size), config.dropout

    def run(params, name, *args) -> Any:
        return modules[name].apply({"params": params[name]}, *args)

    def trunk(params, image):
        if image.dtype == jnp.uint8:
            image = image / 255.0
        return run(params, "image_trunk", image)

    def encode_text(params, text):
        return run(params, "text", text)

    def apply(params, example, *, keys=None, use_dropout=True):
        features, h_text = example.get("features"), example.get("h_text")
        if features is None:
            features = trunk(params, example["image"])
        if h_text is None:
            h_text = encode_text(params, example["text"])
        h_image = run(params, "image_tail", features)
        if keys is not None and rate:
            h_image, h_text = _apply_dropout(h_image, h_text, keys, use_dropout, rate)
        return _apply_heads(run, params, h_image, h_text, example)

    init = _make_init(modules, config, image_size, text_length)
    return Model(init, trunk, encode_text, apply)


def _make_init(modules, config, image_size, text_length):
    """Returns the jitted function `init(key) -> params`."""

    def init(key):
        inputs, params = _module_inputs(config, image_size, text_length), {}
        for i, name in enumerate(sorted(modules)):
            module_key = jax.random.fold_in(key, i)
            params[name] = modules[name].init(module_key, *inputs[name])["params"]
        return params

    # `init` runs once, so on CPUs XLA's optimizations take longer than they save.
    is_on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_on_cpu else None
    return jax.jit(init, compiler_options=options)


def _apply_heads(run, params, h_image, h_text, example) -> Outputs:
    """Computes embeddings and logits from the features of both towers."""
    has = example["has_image"], example["has_text"]
    fused, h_fused = run(params, "fused_head", h_image, h_text, *has)
    return Outputs(
        z_image=l2_normalize(run(params, "image_projection", h_image)),
        z_text=l2_normalize(run(params, "text_projection", h_text)),
        h_image=h_image,
        h_text=h_text,
        h_fused=h_fused,
        image=run(params, "image_head", h_image),
        text=run(params, "text_head", h_text),
        fused=fused,
    )


def _make_modules(config, num_classes, vocab_size) -> dict[str, nn.Module]:
    dtype = jnp.dtype(config.dtype)
    options = {"heads": config.heads, "dtype": dtype, "remat": config.remat}
    return {
        "image_trunk": towers.ImageTrunk(
            config.patch,
            config.image_width,
            config.image_depth - config.tail_blocks,
            returns_pooled=not config.tail_blocks,
            **options,
        ),
        "image_tail": towers.ImageTail(config.tail_blocks, **options),
        "text": towers.TextTower(
            vocab_size, config.text_width, config.text_depth, **options
        ),
        "image_projection": nn.Dense(config.embed_dim, use_bias=False),
        "text_projection": nn.Dense(config.embed_dim, use_bias=False),
        "image_head": nn.Dense(num_classes),
        "text_head": nn.Dense(num_classes),
        "fused_head": FusedHead(num_classes, config.text_width),
    }


def _module_inputs(config, image_size, text_length) -> dict[str, tuple]:
    """Returns one-row dummy inputs for each module, from which `init` infers shapes."""
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


def _apply_dropout(h_image, h_text, keys, use_dropout, rate):
    """Returns the features of both towers after dropout."""
    both = jnp.concatenate([h_image, h_text], axis=1)
    shape = both.shape[1:]
    # The augmentation uses the keys themselves, so dropout folds in a number.
    draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), shape))
    rate = jnp.where(jnp.broadcast_to(use_dropout, len(both)), rate, 0.0)[:, None]
    both = jnp.where(draw(keys) < rate, 0.0, both / (1 - rate))
    return jnp.split(both, [h_image.shape[1]], axis=1)


def _check_sizes(config, image_size):
    """Raises UserError if sizes in the configuration are incompatible."""
    for key, size, divisor in (
        ("data.image_size", image_size, "patch"),
        ("model.image_width", config.image_width, "heads"),
        ("model.text_width", config.text_width, "heads"),
    ):
        if size % getattr(config, divisor):
            raise UserError(
                f"{key}={size}: not a multiple of model.{divisor}="
                f"{getattr(config, divisor)}; change one of them"
            )
    if config.patch > 3 and config.patch % 2:
        raise UserError(
            f"model.patch={config.patch}: odd, but edge histograms split patches in "
            "half; use an even number"
        )
    if not 0 <= config.tail_blocks <= config.image_depth:
        raise UserError(
            f"model.tail_blocks={config.tail_blocks}: must be between 0 and "
            f"model.image_depth={config.image_depth}; change one of them"
        )
