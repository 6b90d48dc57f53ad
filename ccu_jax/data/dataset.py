"""The prepared data set that every other package works with."""

from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """A prepared data set: N rows, K classes, S x S pixel images, T tokens per text.

    `image` and `text` are memory-mapped, everything else is in memory.
    """

    name: str  # a key of `ccu_jax.data.DATASETS`
    edition: str  # "official", "sample", "clipart" or "own"
    classes: tuple[str, ...]  # K names
    multi_label: bool
    metric: str  # the headline score, a key of `metrics.classification`
    image: np.ndarray  # uint8 [N, S, S, 3]; zeros where has_image is False
    text: np.ndarray  # int32 [N, T]; padded with 0, every row has an end token
    labels: np.ndarray  # float32 [N, K], multi-hot (one-hot if not multi_label)
    has_image: np.ndarray  # bool [N]
    has_text: np.ndarray  # bool [N]
    id: np.ndarray  # str [N], unique
    group: np.ndarray  # str [N]; rows of a group are unlearned together
    split: np.ndarray  # str [N]: "train", "validation" or "test"
    cluster: np.ndarray  # int [N]: smallest row number among near-duplicates
    vocabulary: int  # number of token ids
    counts: dict[str, int]  # numbers of rows read, used, and skipped for each reason
    fingerprint: str  # hash of the classes and all columns
    purged: bool = False  # whether images were blanked by `ccu_jax.data.purge_images`
