"""The audit table has a row per method and no empty columns."""

import numpy as np
import pytest

from ccu_jax.reports import audit_table
from tests.reports.conftest import cells_of

SEEDS = 6


@pytest.fixture
def method():
    """A method of the smoke tier, measured on the same rows in every seed."""
    record = {"members": "same", "compared": True, "costs_s": {"gaps": 0.25}}
    record |= {"gaps": {"average_gap": [2.0, 1.0, 3.0], "tug_of_war": None}}
    record |= {"seconds": {"smoke": 0.5}}
    verdict = {"word": "forgotten", "sentence": "image: forgotten: attack AUC 0.51"}
    differences = {"image": [0.01, -0.02, 0.04], "fused": None, "pair": None}
    return {
        "method": "retrain_visual_2",
        "edition": "sample",
        "verdict": verdict | {"differences": differences},
        "seeds": [record | {"seed": seed} for seed in range(SEEDS)],
    }


def make_cells(method):
    return cells_of(audit_table.make_table([method]))[0]


def test_columns_without_values_are_left_out(method):
    assert make_cells(method) == {
        "method": "retrain_visual_2",
        "verdict": "forgotten",
        "Δ AUC vs retrain_visual, image": "+0.010 (-0.020 to +0.040)",
        "average gap": "2.0 (1.0 to 3.0)",
        "wall time (s)": "3.0",
    }
    text = audit_table.to_markdown([method])
    assert "**Sample edition" in text and "Wall time (s) over all" in text
    assert "gaps 1.5." in text and "- **retrain_visual_2**: image: forgotten" in text


def test_relearning_and_shadow_models_have_columns(method):
    for record in method["seeds"]:
        record["relearning"] = {"steps": 30, "min_steps": 20, "max_steps": None}
        record["relearning"] |= {"limit": 99, "diverged": None}
        record["pool"] = {"image": {"shadows": 16, "ulira": {"auc": [0.5, 0.4, 0.6]}}}
    method["seeds"][0]["costs_s"] = {"shadow models": 70.0}
    cells = make_cells(method)
    assert cells["relearning steps"] == "30 (20 to > 99)"
    assert cells["U-LiRA AUC"] == "0.500 (0.400 to 0.600)"
    assert cells["shadow models"] == "16"
    assert cells["wall time (s)"] == "3.0 + 70 for shadow models"
    # Seeds with different unlearn sets have independent errors.
    for seed, record in enumerate(method["seeds"]):
        record["members"] = str(seed)
    low = 0.5 - 0.1 / np.sqrt(SEEDS)
    assert make_cells(method)["U-LiRA AUC"] == f"0.500 ({low:.3f} to {1 - low:.3f})"


def test_seeds_that_lack_a_value_or_differ_are_stated(method):
    for seed, record in enumerate(method["seeds"]):
        ulira = {"auc": [0.5, 0.4, 0.6]} if seed else None
        record["pool"] = {"image": {"shadows": 16 if seed else 8, "ulira": ulira}}
        record["relearning"] = {"diverged": "step 1: loss nan"}
    cells = make_cells(method)
    assert cells["shadow models"] == "8, 16"
    assert cells["U-LiRA AUC"].endswith("), 5 of 6 seeds")
    assert cells["relearning steps"] == "diverged (step 1: loss nan)"
