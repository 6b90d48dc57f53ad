"""How alike rows are by picture and text alone: no model and no labels.

A picture is its thumbnail of 8 x 8 in colours less the mean one, a text the set of its
tokens, each counting the more the fewer texts have it (Sparck Jones 1972). Both are
compared by their cosine, chunk by chunk: memory does not grow with the pictures.
"""

import einops
import numpy as np
import scipy.sparse

from ccu_jax.data.near_duplicates import shrink

_CHUNK = 32 << 20  # bytes of pictures looked at together
_TEXTS = 8192
_SAMPLE = 4096  # rows that say what the mean picture is
_SIDE = 32  # finer than so a picture is not looked at: that is quick, too


def similarity(data, rows: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """How near each row is to the centre, `[len(rows)]`, the higher the nearer.

    The sum of both cosines, each in its standard deviations; what a row lacks is as
    near as the mean.

    Args:
        data: a `ccu_jax.data.Dataset`.
        rows: rising numbers of rows.
        centre: the rows in the centre.
    """
    total = np.zeros(len(rows))
    for has, cosines in (
        (data.has_image, _image_cosines),
        (data.has_text, _text_cosines),
    ):
        there, middle = has[rows], centre[has[centre]]
        if there.any() and len(middle):
            value = cosines(data, rows[there], middle)
            total[there] += (value - value.mean()) / max(value.std(), 1e-6)
    return total


def _image_cosines(data, rows, centre) -> np.ndarray:
    """Cosines of pictures with the mean of the centre's."""
    some = rows[:: -(-len(rows) // _SAMPLE)]
    mean = np.concatenate(list(_thumbnails(data, some))).mean(axis=0)
    middle = np.concatenate([_unit(x - mean) for x in _thumbnails(data, centre)])
    middle = _unit(middle.mean(axis=0)[None])[0]
    pieces = [_unit(x - mean) @ middle for x in _thumbnails(data, rows)]
    return np.concatenate(pieces).astype(float)


def _thumbnails(data, rows):
    """Yields thumbnails `[n, 192]` of a chunk of pictures after the other."""
    chunk = max(1, _CHUNK // data.image[:1].nbytes)
    step = max(1, data.image.shape[1] // _SIDE)
    for start in range(0, len(rows), chunk):
        pictures = np.asarray(data.image)[rows[start : start + chunk]]
        small = shrink(pictures[:, ::step, ::step])
        yield einops.reduce(small, "n (h a) (w b) c -> n (h w c)", "mean", a=2, b=2)


def _unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def _text_cosines(data, rows, centre) -> np.ndarray:
    """Cosines of texts with the mean of the centre's."""
    vocabulary = int(data.vocabulary)
    known = sum(
        np.bincount(bag.indices, minlength=vocabulary) for bag in _bags(data, rows)
    )
    weight = np.log((1 + len(rows)) / (1 + known))

    def weighed(rows):
        for bag in _bags(data, rows):
            bag.data = weight[bag.indices]
            yield bag, np.sqrt(np.maximum((bag * bag).sum(axis=1), 1e-12))

    middle = sum((bag.T @ (1 / norm)) for bag, norm in weighed(centre))
    middle /= max(np.linalg.norm(middle), 1e-6)
    return np.concatenate([bag @ middle / norm for bag, norm in weighed(rows)])


def _bags(data, rows):
    """Yields which tokens texts have, `[n, vocabulary]`, a chunk after the other."""
    for start in range(0, len(rows), _TEXTS):
        text = np.asarray(data.text[rows[start : start + _TEXTS]])
        row, place = np.nonzero(text)
        token = text[row, place]
        # Of a token that comes several times only one is kept.
        pairs = np.unique(row * np.int64(data.vocabulary) + token)
        row, token = np.divmod(pairs, data.vocabulary)
        yield scipy.sparse.csr_array(
            (np.ones(len(pairs)), (row, token)), (len(text), int(data.vocabulary))
        )
