"""A purge removes every model that was trained on the unlearned images."""

import shutil

import numpy as np
import pytest

from ccu_jax.errors import UserError
from ccu_jax.runs import purge
from ccu_jax.runs.results import write_result
from ccu_jax.train import checkpoint

TRAINED_ON_IMAGES = {"w": np.arange(4.0)}


def save(workdir, method, params, diverged=None, has_result=True):
    checkpoint.save(workdir / f"checkpoints/{method}-0/params", 0, params, {})
    if has_result:
        result = {"method": method, "seed": 0, "fingerprint": "f"}
        path = workdir / "stages" / f"{method}-0.json"
        write_result(path, {**result, "diverged": diverged})


def remaining(workdir):
    return {path.parent.name for path in workdir.glob("checkpoints/*/params")}


def test_purge_removes_originals_diverged_and_interrupted_models(tmp_path):
    save(tmp_path, "original", TRAINED_ON_IMAGES)
    save(tmp_path, "retrain_visual", {"w": np.ones(4)})
    save(tmp_path, "broken", TRAINED_ON_IMAGES, diverged="step 1: loss nan")
    for interrupted in ("variants/ccu-0-ab", "tested/ccu-0-cd"):
        checkpoint.save(tmp_path / interrupted, 4, TRAINED_ON_IMAGES, {})
        (tmp_path / f"{interrupted}.json").write_text("{}")
    assert purge._purge_models(tmp_path) == 4
    records = [path.name for path in tmp_path.glob("[tv]*/*")]
    assert sorted(records) == ["ccu-0-ab.json", "ccu-0-cd.json"]
    assert remaining(tmp_path) == {"retrain_visual-0"}
    save(tmp_path, "scrub", {"w": np.full(4, 2.0)}, has_result=False)
    assert purge._purge_models(tmp_path) == 1
    assert remaining(tmp_path) == {"retrain_visual-0"}


def test_purge_finds_a_copy_of_a_removed_model_and_keeps_both_until_it_is_gone(
    tmp_path,
):
    save(tmp_path, "original", TRAINED_ON_IMAGES)
    save(tmp_path, "hidden", TRAINED_ON_IMAGES)
    for _ in range(2):  # the original is still there to compare with
        with pytest.raises(
            UserError, match="hidden-0/params contains a copy of a model"
        ):
            purge._purge_models(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "hidden-0")
    assert purge._purge_models(tmp_path) == 1
    assert remaining(tmp_path) == set()
