"""Similarity of rows by their images and texts, without a model or labels.

An image is represented by its 8 x 8 color thumbnail minus the mean thumbnail, a text by
its set of tokens weighted by inverse document frequency (Spärck Jones 1972). Both are
compared by cosine similarity, in chunks of bounded size.
"""

from collections.abc import Iterator

import einops
import numpy as np
import scipy.sparse

from ccu_jax.data import Dataset
from ccu_jax.data.near_duplicates import shrink

_CHUNK_BYTES = 32 << 20  # of images in a chunk
_CHUNK_TEXTS = 8192
_MAX_MEAN_ROWS = 4096  # rows averaged for the mean thumbnail
_MIN_SIDE = 32  # larger images are subsampled to about this size first
_EPSILON = 1e-6


def compute_similarity(
    data: Dataset, rows: np.ndarray, center: np.ndarray
) -> np.ndarray:
    """Returns the similarity `[R]` of each row to the mean of the rows `center`.

    It is the sum of the cosines of image and text, each standardized over the rows. A
    missing image or text counts as the mean, 0.
    """
    total = np.zeros(len(rows))
    for has_modality, cosines_to_center in (
        (data.has_image, _image_cosines),
        (data.has_text, _text_cosines),
    ):
        is_present, present_center = has_modality[rows], center[has_modality[center]]
        if is_present.any() and len(present_center):
            cosines = cosines_to_center(data, rows[is_present], present_center)
            standardized = (cosines - cosines.mean()) / max(cosines.std(), _EPSILON)
            total[is_present] += standardized
    return total


def _image_cosines(data: Dataset, rows: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Returns the cosine of each row's thumbnail and the mean of the center's."""
    sample = rows[:: -(-len(rows) // _MAX_MEAN_ROWS)]
    mean = np.concatenate(list(_thumbnails(data, sample))).mean(axis=0)
    units = np.concatenate([_normalize(x - mean) for x in _thumbnails(data, center)])
    direction = _normalize(units.mean(axis=0)[None])[0]
    cosines = [_normalize(x - mean) @ direction for x in _thumbnails(data, rows)]
    return np.concatenate(cosines).astype(float)


def _thumbnails(data: Dataset, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yields 8 x 8 x 3 thumbnails `[n, 192]` of the rows, chunk by chunk."""
    chunk = max(1, _CHUNK_BYTES // data.image[:1].nbytes)
    stride = max(1, data.image.shape[1] // _MIN_SIDE)
    for start in range(0, len(rows), chunk):
        images = np.asarray(data.image)[rows[start : start + chunk]]
        small = shrink(images[:, ::stride, ::stride])
        yield einops.reduce(small, "n (h a) (w b) c -> n (h w c)", "mean", a=2, b=2)


def _normalize(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), _EPSILON)


def _text_cosines(data: Dataset, rows: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Returns the cosine of each row's token set and the mean of the center's."""
    vocabulary = int(data.vocabulary)
    num_texts = sum(
        np.bincount(bags.indices, minlength=vocabulary)
        for bags in _token_sets(data, rows)
    )
    idf = np.log((1 + len(rows)) / (1 + num_texts))

    def yield_weighted_sets(rows):
        for bags in _token_sets(data, rows):
            bags.data = idf[bags.indices]
            yield bags, np.sqrt(np.maximum((bags * bags).sum(axis=1), 1e-12))

    direction = sum(
        (bags.T @ (1 / norms)) for bags, norms in yield_weighted_sets(center)
    )
    direction /= max(np.linalg.norm(direction), _EPSILON)
    return np.concatenate(
        [bags @ direction / norms for bags, norms in yield_weighted_sets(rows)]
    )


def _token_sets(data: Dataset, rows: np.ndarray) -> Iterator[scipy.sparse.csr_array]:
    """Yields binary text-token matrices `[n, vocabulary]`, chunk by chunk."""
    for start in range(0, len(rows), _CHUNK_TEXTS):
        text = np.asarray(data.text[rows[start : start + _CHUNK_TEXTS]])
        row, position = np.nonzero(text)
        # A token that a text repeats is counted once.
        pairs = np.unique(row * np.int64(data.vocabulary) + text[row, position])
        row, token = np.divmod(pairs, data.vocabulary)
        yield scipy.sparse.csr_array(
            (np.ones(len(pairs)), (row, token)), (len(text), int(data.vocabulary))
        )
