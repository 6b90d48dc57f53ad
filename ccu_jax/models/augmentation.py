"""Random changes to training rows: each row has a key of its own.

Keys belong to rows and not to devices or batches, so a run draws the same on one device
and on many.
"""

import jax
import jax.numpy as jnp

from ccu_jax.config.schema import Train

UNKNOWN = 1  # the token id that a dropped word becomes
_PICTURE, _HIDE = 8, 2  # random numbers that each change takes


def augment(example, keys, config: Train):
    """Augmented pictures and texts, and what the fused view may look at.

    Args:
        example: `image` uint8 `[B, S, S, 3]`, `text` `[B, T]`, `has_image`, `has_text`.
        keys: one per row, `[B]`.
        config: how strongly.

    Returns:
        The example with float pictures in 0..1 and changed words; `has_image` and
        `has_text` now say what fusion may look at (never hiding the only modality), and
        `image_weight`, `text_weight` `[B]` what there really is.
    """

    length = example["text"].shape[1]

    def one(image, text, has_image, has_text, key):
        # One draw for everything: each call of the generator takes long to compile.
        draw = jax.random.uniform(key, (_PICTURE + _HIDE + length,))
        return (
            _picture(image / 255.0, draw[:_PICTURE], config),
            _words(text, draw[_PICTURE + _HIDE :], config.word_dropout),
            *_hide(has_image, has_text, draw[_PICTURE:], config.modality_dropout),
        )

    image, text, see_image, see_text = jax.vmap(one)(
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
        "has_image": see_image,
        "has_text": see_text,
        "image_weight": example["has_image"].astype(jnp.float32),
        "text_weight": example["has_text"].astype(jnp.float32),
    }


def hide(has_image, has_text, keys, rate):
    """What fusion may look at `[B]` twice: now and then one of two is hidden."""
    draw = jax.vmap(lambda key: jax.random.uniform(key, (_HIDE,)))(keys)
    return jax.vmap(_hide, (0, 0, 0, None))(has_image, has_text, draw, rate)


def _hide(has_image, has_text, draw, rate):
    hidden = (draw[0] < rate) & has_image & has_text
    picture = draw[1] < 0.5
    return has_image & ~(hidden & picture), has_text & ~(hidden & ~picture)


def _picture(image, draw, config):
    """One picture `[S, S, 3]`: shifted, stretched, flipped, tinted."""
    side = image.shape[0]
    spread = 2 * draw - 1  # -1..1
    zoom = jnp.exp(spread[0:2] * config.zoom)
    shift = spread[2:4] * config.shift
    # Where each output pixel comes from, along each axis, in input pixels. Bilinear
    # resampling along one axis is a matrix, which is far faster than gathering pixels.
    centre = (side - 1) / 2
    source = (jnp.arange(side)[None] - centre - shift[:, None]) / zoom[:, None] + centre
    source = jnp.clip(source, 0, side - 1)
    weight = jnp.maximum(0, 1 - jnp.abs(source[:, :, None] - jnp.arange(side)))
    if config.flip:
        # Columns in reverse: the same as reversing the picture.
        flip = (draw[7] < 0.5) * 1.0
        weight = weight.at[1].set(flip * weight[1, ::-1] + (1 - flip) * weight[1])
    image = jnp.einsum("yh,xw,hwc->yxc", weight[0], weight[1], image)
    tint = 1 + config.tint * spread[4:7]
    # Around white, the background of most drawings and of many product pictures.
    return jnp.clip(1 + (image - 1) * tint, 0, 1)


def _words(text, draw, rate):
    return jnp.where((draw < rate) & (text > UNKNOWN), UNKNOWN, text)
