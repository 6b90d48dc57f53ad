"""Columns can be continued after a kill, and read without a memory map."""

import contextlib
import hashlib

import numpy as np
import pytest

from ccu_jax.storage.columns import ColumnReader, ColumnWriter

ROWS = np.arange(30, dtype=np.int32).reshape(10, 3)


@pytest.mark.parametrize("name", ["x.npy", "x.bin"])
def test_a_column_is_continued_after_its_first_rows(tmp_path, name):
    path = tmp_path / name
    with ColumnWriter(path, np.int32, (3,)) as column:
        column.append(ROWS[:4])
        column.append(ROWS[4:9])
    with ColumnWriter(path, np.int32, (3,), num_rows=7) as column:
        column.append(ROWS[7:])
        column.sync()
        assert column.num_rows == 10
    if name.endswith(".npy"):
        np.testing.assert_array_equal(np.load(path, mmap_mode="r"), ROWS)
    else:
        assert path.read_bytes() == ROWS.tobytes()
        assert column.sha256.digest() == hashlib.sha256(ROWS[7:].tobytes()).digest()
    with pytest.raises(ValueError, match="fewer than 11 rows"):
        ColumnWriter(path, np.int32, (3,), num_rows=11)


def test_rows_of_another_type_or_shape_are_rejected(tmp_path):
    with ColumnWriter(tmp_path / "x.npy", np.int32, (3,)) as column:
        for rows in (ROWS.astype(np.int64), ROWS[:, :2]):
            with pytest.raises(ValueError, match="expected rows of"):
                column.append(rows)


def test_rows_are_read_by_their_indices(tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    with contextlib.closing(ColumnReader(tmp_path / "x.npy")) as reader:
        assert reader.shape == (10, 3)
        np.testing.assert_array_equal(reader.slice(2, 5), ROWS[2:5])
        np.testing.assert_array_equal(reader.take(np.array([7, 0, 7])), ROWS[[7, 0, 7]])
