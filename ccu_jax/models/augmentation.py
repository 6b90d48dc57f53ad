"""Random augmentation of training rows.

Each row has a random key of its own, so that a run draws the same numbers on one device
and on many.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ccu_jax.config.schema import Train

UNKNOWN = 1  # token id of dropped words
# Random numbers that the augmentation of an image and modality dropout consume.
_IMAGE_DRAWS, _MODALITY_DRAWS = 8, 2


def augment(example: dict[str, Array], keys: Array, config: Train) -> dict[str, Array]:
    """Augments images and texts, and hides modalities from the fused view.

    Args:
        example: `image` uint8 `[B, S, S, 3]`, `text` `[B, T]`, `has_image`, `has_text`.
        keys: random keys `[B]`.
        config: strengths of the augmentations.

    Returns:
        The example with float images in [0, 1] and dropped words. `has_image` and
        `has_text` now say what the fused view sees, which is at least one modality of
        those present; `image_weight` and `text_weight` `[B]` say which are present.
    """
    length = example["text"].shape[1]

    def augment_row(image, text, has_image, has_text, key):
        # A single draw, because each call of the generator is slow to compile.
        draw = jax.random.uniform(key, (_IMAGE_DRAWS + _MODALITY_DRAWS + length,))
        return (
            augment_image(image / 255.0, draw[:_IMAGE_DRAWS], config),
            _drop_words(
                text, draw[_IMAGE_DRAWS + _MODALITY_DRAWS :], config.word_dropout
            ),
            *_drop_modality(
                has_image, has_text, draw[_IMAGE_DRAWS:], config.modality_dropout
            ),
        )

    image, text, sees_image, sees_text = jax.vmap(augment_row)(
        example["image"],
        example["text"],
        example["has_image"],
        example["has_text"],
        keys,
    )
    return {
        **example,
        "image": image,
        "text": text,
        "has_image": sees_image,
        "has_text": sees_text,
        "image_weight": example["has_image"].astype(jnp.float32),
        "text_weight": example["has_text"].astype(jnp.float32),
    }


def drop_modalities(
    has_image: Array, has_text: Array, keys: Array, rate: float
) -> tuple[Array, Array]:
    """Hides one of two modalities from the fused view, in a fraction of the rows.

    Returns what the fused view sees of images and of texts, bool `[B]` each.
    """
    draw = jax.vmap(lambda key: jax.random.uniform(key, (_MODALITY_DRAWS,)))(keys)
    return jax.vmap(_drop_modality, (0, 0, 0, None))(has_image, has_text, draw, rate)


def _drop_modality(has_image, has_text, draw, rate):
    drops = (draw[0] < rate) & has_image & has_text
    drops_image = draw[1] < 0.5
    return has_image & ~(drops & drops_image), has_text & ~(drops & ~drops_image)


def augment_image(image: Array, draw: Array, config: Train) -> Array:
    """Shifts, stretches, flips and tints an image `[S, S, 3]` in [0, 1].

    `draw` are 8 uniform random numbers.
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


def _drop_words(text, draw, rate):
    return jnp.where((draw < rate) & (text > UNKNOWN), UNKNOWN, text)
