"""A small batch of rows for the tests of the models."""

import numpy as np
import pytest

from tests import toy

NUM_ROWS = 12


@pytest.fixture(scope="session")
def example():
    data = toy.make_dataset(NUM_ROWS)
    return {name: np.asarray(getattr(data, name)) for name in toy.TABLE_COLUMNS}
