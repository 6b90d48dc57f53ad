"""Rows of finished stages: what is read of them, and what is refused."""

import json

import pytest

from ccu_jax.errors import UserError
from ccu_jax.runs import results as rows
from ccu_jax.storage.records import add_checksum


def written(workdir, name, **row):
    path = workdir / "stages" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    rows.write_result(path, row)
    return path


def test_rows_come_by_seed_and_in_the_order_of_the_methods(tmp_path):
    for method, seed in (("ccu_plus", 1), ("ccu", 0), ("original", 0), ("other", 0)):
        written(tmp_path, f"{method}-{seed}", method=method, seed=seed, fingerprint="f")
    found = [(row["seed"], row["method"]) for row in rows.load_all_results(tmp_path)]
    assert found == [(0, "original"), (0, "ccu"), (0, "other"), (1, "ccu_plus")]


@pytest.mark.parametrize(
    ("method", "seed"), [("../../elsewhere", 0), ("ccu_plus", 1), ("original", 0)]
)
def test_a_row_of_another_name_is_refused_as_it_would_name_other_files(
    tmp_path, method, seed
):
    path = written(tmp_path, "ccu_plus-0", method=method, seed=seed, fingerprint="f")
    with pytest.raises(UserError, match=f"{path} is not its own row: remove it"):
        rows.load_all_results(tmp_path)


def test_a_record_that_is_nested_without_end_is_damaged(tmp_path):
    path = written(tmp_path, "ccu-0", method="ccu", seed=0, fingerprint="f")
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match=f"{path} is damaged: remove it"):
        rows.load_result(path)


_ROW = {"method": "ccu_plus", "seed": 0, "fingerprint": "f", "score": 0.1524}


@pytest.mark.parametrize(
    "row", [{}, [], 3, "x", _ROW, add_checksum({}), add_checksum({**_ROW, "seed": "0"})]
)
def test_what_is_no_row_is_damaged(tmp_path, row):
    path = written(tmp_path, "ccu_plus-0")
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"{path} is damaged"):
        rows.load_all_results(tmp_path)


def test_no_flipped_bit_of_a_row_goes_unnoticed(tmp_path):
    path = written(tmp_path, "ccu_plus-0", **_ROW)
    assert rows.load_result(path) == _ROW
    content = path.read_bytes()
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert rows.load_result(path) == _ROW  # of a space, say
        except UserError as error:
            assert "is damaged" in str(error)
