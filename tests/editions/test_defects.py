"""Readers count every planted defect, and nothing else."""

import dataclasses
import re
from collections import Counter
from typing import Any

import pytest

from ccu_jax.config.loading import load_config
from ccu_jax.data import load
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError
from tests.data.readers.layouts import ignore_progress
from tests.editions import PLANT, write_with_defects


def load_edition(name, root, workdir, **settings):
    config = load_config(name).data
    # Smaller images would make different ones near-duplicates.
    changes: dict[str, Any] = {"image_size": 48, "records": False} | settings
    config = dataclasses.replace(config, dir=str(root), **changes)
    return load(config, workdir, ignore_progress)


@pytest.mark.parametrize(
    "name, rows, seed",
    [
        ("mmimdb", 80, 0),
        ("fashion200k", 200, 0),
        ("hatefulmemes", 400, 0),  # an even seed packs the images into an archive
        ("hatefulmemes", 400, 1),
        ("medical", 80, 0),
        ("satellite", 80, 1),
    ],
)
def test_counts_change_by_the_planted_defects(name, rows, seed, tmp_path):
    root = tmp_path / "source"
    editions.write_if_missing(name, root, rows, seed, ignore_progress)
    clean = load_edition(name, root, tmp_path / "clean").counts
    assert not any(key.startswith("skipped: ") for key in clean)
    expected = Counter(clean)
    expected.update(PLANT[name](root, seed))
    data = load_edition(name, root, tmp_path / "w")
    counts = Counter(data.counts)
    rows = [key for key in counts if re.match("skipped: (?!archive member)|used", key)]
    assert sum(counts[key] for key in rows) == counts.pop("read")
    assert counts.pop("used") == len(data.id)
    del expected["read"], expected["used"]
    assert counts == +expected


@pytest.mark.parametrize("name", ["mmimdb", "fashion200k", "hatefulmemes", "medical"])
def test_strict_run_stops_at_the_first_defect(name, tmp_path):
    write_with_defects(name, tmp_path / "source", 400, 0)
    with pytest.raises(UserError, match="data.strict is on: fix or remove"):
        load_edition(name, tmp_path / "source", tmp_path / "w", strict=True)
    assert not (tmp_path / "w" / "data").exists()
