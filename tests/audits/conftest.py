"""Predictions of simulated models, and contexts of runs on toy data."""

import numpy as np
import pytest

from ccu_jax.evaluate.predictions import Predictions
from tests.toy import make_context


def make_predictions(logits, labels, pair, sizes, *, multi_label=False, group=None):
    """Returns predictions of rows with image and text, `sizes` of them by split."""
    num_rows = len(labels)
    return Predictions(
        logits=logits,
        pair=pair,
        labels=labels,
        split=np.repeat(list(sizes), list(sizes.values())),
        id=np.array([f"row{i}" for i in range(num_rows)]),
        has_image=np.ones(num_rows, bool),
        has_text=np.ones(num_rows, bool),
        multi_label=multi_label,
        trunk_probe=pair,
        group=np.arange(num_rows) if group is None else group,
    )


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Makes the context of a run and the list of its warnings."""

    def make(problem, data):
        warnings: list[str] = []
        ctx = make_context(problem, data, tmp_path)
        monkeypatch.setattr(ctx.reporter, "warn", warnings.append)
        return ctx, warnings

    return make
