"""Random augmentation of training rows.

Each row has its own random key, so augmentation does not depend on the device count.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ccu_jax.config.schema import Train

UNKNOWN = 1  # token id of dropped words
# Number of uniform draws per row for image augmentation and for modality dropout.
_IMAGE_DRAWS, _MODALITY_DRAWS = 8, 2


def augment(rows: dict[str, Array], keys: Array, config: Train) -> dict[str, Array]:
    """Augments images and texts, and hides modalities from the fused view.

    Args:
        rows: `image` uint8 `[B, S, S, 3]`, `text` `[B, T]`, `has_image`, `has_text`.
        keys: random keys `[B]`.
        config: strengths of the augmentations.

    Returns:
        The rows with float images in [0, 1] and some words dropped. `has_image` and
        `has_text` mark the modalities that the fused view sees, at least one;
        `image_weight` and `text_weight` `[B]` are 1.0 for those that the row has.
    """
    text, starts = rows["text"], (_IMAGE_DRAWS, _IMAGE_DRAWS + _MODALITY_DRAWS)
    # A single draw, because each call of the generator is slow to compile.
    draw = _draw_per_row(keys, starts[-1] + text.shape[1])
    image_draw, modality_draw, word_draw = jnp.split(draw, starts, axis=1)
    augment_images = jax.vmap(lambda image, draw: augment_image(image, draw, config))
    is_dropped = (word_draw < config.word_dropout) & (text > UNKNOWN)
    rows = {
        **rows,
        "image": augment_images(rows["image"] / 255.0, image_draw),
        "text": jnp.where(is_dropped, UNKNOWN, text),
    }
    return _drop_modalities(rows, modality_draw, config.modality_dropout)


def _draw_per_row(keys, count):
    """Draws `count` uniform numbers in [0, 1) for each key, `[B, count]`."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


def drop_modalities(rows: dict[str, Array], rate: float) -> dict[str, Array]:
    """Hides image or text from the fused view in a fraction `rate` of rows with both.

    Uses each row's `key`; updates `has_image`, `has_text` and weights like `augment`.
    """
    return _drop_modalities(rows, _draw_per_row(rows["key"], _MODALITY_DRAWS), rate)


def _drop_modalities(rows, draw, rate):
    """Implements `drop_modalities` for uniform draws `[B, 2]`."""
    has_image, has_text = rows["has_image"], rows["has_text"]
    drops = (draw[:, 0] < rate) & has_image & has_text
    drops_image = draw[:, 1] < 0.5
    return {
        **rows,
        "has_image": has_image & ~(drops & drops_image),
        "has_text": has_text & ~(drops & ~drops_image),
        "image_weight": has_image.astype(jnp.float32),
        "text_weight": has_text.astype(jnp.float32),
    }


def augment_image(image: Array, draw: Array, config: Train) -> Array:
    """Shifts, stretches, flips and tints an image `[S, S, 3]` in [0, 1].

    `draw` is 8 uniform random numbers in [0, 1).
    """
    size = image.shape[0]
    signed = 2 * draw - 1  # in [-1, 1]
    zoom = jnp.exp(signed[0:2] * config.zoom)
    shift = signed[2:4] * config.shift
    # The input coordinate of each output pixel, along each axis. Bilinear resampling
    # along an axis is a matrix product, which is much faster than gathering pixels.
    center = (size - 1) / 2
    source = (jnp.arange(size)[None] - center - shift[:, None]) / zoom[:, None] + center
    source = jnp.clip(source, 0, size - 1)
    weight = jnp.maximum(0, 1 - jnp.abs(source[:, :, None] - jnp.arange(size)))
    if config.flip:
        # Reversing the columns of the matrix reverses the image.
        flip = (draw[7] < 0.5) * 1.0
        weight = weight.at[1].set(flip * weight[1, ::-1] + (1 - flip) * weight[1])
    image = jnp.einsum("yh,xw,hwc->yxc", weight[0], weight[1], image)
    tint = 1 + config.tint * signed[4:7]
    # White, the background of drawings and product images, stays white.
    return jnp.clip(1 + (image - 1) * tint, 0, 1)
