"""Readers count every planted defect, and nothing else."""

import dataclasses
from typing import Any

import pytest

from ccu_jax.config.loading import load_config
from ccu_jax.data import load
from ccu_jax.errors import UserError
from tests.editions import write_with_defects
from tests.editions.defects import expected_counts


def load_with_defects(name, root, workdir, **settings):
    config = load_config(name).data
    # Smaller images would make different ones near-duplicates.
    changes: dict[str, Any] = {"image_size": 48, "records": False} | settings
    config = dataclasses.replace(config, dir=str(root), **changes)
    return load(config, workdir, lambda stage, done, total: None)


@pytest.mark.parametrize(
    "name, rows, seed",
    [
        ("mmimdb", 40, 3),
        ("fashion200k", 200, 0),
        ("fashion200k", 200, 3),
        ("hatefulmemes", 150, 0),  # an even seed packs the images into an archive
        ("hatefulmemes", 150, 1),
        ("hatefulmemes", 240, 12),
        ("medical", 70, 0),
        ("satellite", 70, 5),
    ],
)
def test_counts_equal_planted_defects(name, rows, seed, tmp_path):
    defects = write_with_defects(name, tmp_path / "source", rows, seed)
    data = load_with_defects(name, tmp_path / "source", tmp_path / "w")
    counts = dict(data.counts)
    read, used = counts.pop("read"), counts.pop("used")
    assert counts == expected_counts(defects)
    skipped_rows = sum(
        number
        for key, number in counts.items()
        if key.startswith("skipped: ") and not key.startswith("skipped: archive member")
    )
    assert read - skipped_rows == used == len(data.id)
    # Images of archives that were skipped are missing, not rows of their own.
    harmless = {defect.where for defect in defects if defect.count is None}
    assert name != "mmimdb" or harmless <= set(data.id)


@pytest.mark.parametrize("name", ["mmimdb", "fashion200k", "hatefulmemes", "medical"])
def test_strict_run_stops_at_the_first_defect(name, tmp_path):
    write_with_defects(name, tmp_path / "source", 200, 0)
    with pytest.raises(UserError, match="data.strict is on: mend or remove"):
        load_with_defects(name, tmp_path / "source", tmp_path / "w", strict=True)
    assert not (tmp_path / "w" / "data").exists()
