"""Rows of finished stages: what is read of them, and what is refused."""

import json

import pytest

from ccu_jax import rows
from ccu_jax.errors import UserError


def written(workdir, name, **row):
    path = workdir / "stages" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(row))
    return path


def test_rows_come_by_seed_and_in_the_order_of_the_methods(tmp_path):
    for method, seed in (("ccu_plus", 1), ("ccu", 0), ("original", 0), ("other", 0)):
        written(tmp_path, f"{method}-{seed}", method=method, seed=seed, fingerprint="f")
    found = [(row["seed"], row["method"]) for row in rows.read_all(tmp_path)]
    assert found == [(0, "original"), (0, "ccu"), (0, "other"), (1, "ccu_plus")]


@pytest.mark.parametrize(
    ("method", "seed"), [("../../elsewhere", 0), ("ccu_plus", 1), ("original", 0)]
)
def test_a_row_of_another_name_is_refused_as_it_would_name_other_files(
    tmp_path, method, seed
):
    path = written(tmp_path, "ccu_plus-0", method=method, seed=seed, fingerprint="f")
    with pytest.raises(UserError, match=f"{path} is not its own row: remove it"):
        rows.read_all(tmp_path)


@pytest.mark.parametrize(
    "row",
    [{}, [], 3, "x", {"method": "ccu_plus", "seed": "0", "fingerprint": "f"}],
)
def test_what_is_no_row_is_damaged(tmp_path, row):
    path = written(tmp_path, "ccu_plus-0")
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"{path} is damaged"):
        rows.read_all(tmp_path)
