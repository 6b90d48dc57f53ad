"""A data set to draw from, and a function that draws with estimates of memorization."""

import numpy as np
import pytest

from ccu_jax.unlearn_sets import splits
from ccu_jax.unlearn_sets.rules import Memorization
from tests import toy


@pytest.fixture(scope="module", params=[1, 4], ids=["single rows", "groups of 4"])
def data(request):
    data = toy.make_dataset(700, per_group=request.param, multi_label=True)
    # In groups, half of the rows of every third group are green.
    rows = np.arange(700)
    is_green = (rows // request.param % 3 == 0) & (rows % 4 < 2)
    return data._replace(labels=np.where(is_green[:, None], 1, data.labels * [1, 0, 1]))


def make_memorization(data):
    """Returns random estimates; those of rows without an image must not be used."""
    number = np.array([int(name.partition("row")[2]) for name in data.id.tolist()])
    estimates = np.random.default_rng(5).random((2, 2000))[:, number]
    return Memorization(*np.where(data.has_image, estimates, 9))


def draw(data, rule, seed=0, holdout=0.2):
    return splits.draw_sets(
        data, rule, seed, holdout, memorization=make_memorization(data)
    )


def write_ids(folder, ids):
    """Writes a file of ids; returns its rule."""
    path = folder / "ids.txt"
    path.write_text("# forget these\n\n" + "".join(f"{i}  \n" for i in ids))
    return f"ids:{path}"
