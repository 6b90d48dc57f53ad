"""Columns on disk: arrays `[N, *row_shape]` written row by row, `.npy` or raw bytes.

Plain files instead of memory maps: on a full disk a write to a memory map kills the
process instead of raising OSError, and its dirty pages count as the process's memory.
"""

import hashlib
import os
import pathlib

import numpy as np
from numpy.typing import DTypeLike


class ColumnWriter:
    """Appends rows to a file whose final number of rows is not known in advance.

    A file whose name ends in `.npy` has NumPy's header, any other file has none.
    `sha256` hashes the rows that this writer has appended.
    """

    def __init__(
        self,
        path: pathlib.Path,
        dtype: DTypeLike,
        row_shape: tuple[int, ...] = (),
        num_rows: int = 0,
    ):
        """Creates the file, or reopens and truncates it to its first `num_rows` rows.

        Raises ValueError if the file has fewer rows.
        """
        self.dtype, self.row_shape = np.dtype(dtype), tuple(row_shape)
        self.num_rows, self._has_header = num_rows, path.suffix == ".npy"
        self.sha256 = hashlib.sha256()
        row_bytes = self.dtype.itemsize * int(np.prod(self.row_shape, dtype=np.int64))
        self._file = path.open("r+b" if num_rows else "wb")
        end = self._write_header() + num_rows * row_bytes
        if self._file.seek(0, os.SEEK_END) < end:
            self._file.close()
            raise ValueError(f"{path}: fewer than {num_rows} rows")
        self._file.seek(end)
        self._file.truncate()

    def append(self, rows: np.ndarray) -> None:
        """Appends rows `[n, *row_shape]`."""
        if rows.shape[1:] != self.row_shape or rows.dtype != self.dtype:
            raise ValueError(
                f"expected rows of shape {self.row_shape} and type {self.dtype}, got "
                f"{rows.shape[1:]} and {rows.dtype}"
            )
        content = np.ascontiguousarray(rows).tobytes()
        self._file.write(content)
        self.sha256.update(content)
        self.num_rows += len(rows)

    def sync(self) -> None:
        """Flushes all rows to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write_header(self) -> int:
        """Writes the header, if any, and returns the offset of the first row."""
        self._file.seek(0)
        if self._has_header:
            # NumPy pads the header so that the first axis can grow in place.
            header = {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.num_rows, *self.row_shape),
            }
            np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def __enter__(self) -> "ColumnWriter":
        """Returns the open writer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Writes the final header, unless an error occurred, and closes the file."""
        with self._file:
            if error[0] is None:
                self._write_header()


class ColumnReader:
    """Reads rows of an `.npy` file by their indices, without mapping the file."""

    def __init__(self, path: pathlib.Path):
        """Opens the file and reads its header."""
        mapped = np.load(path, mmap_mode="r")
        self.shape, self._dtype, self._start = mapped.shape, mapped.dtype, mapped.offset
        self._row_bytes = mapped.dtype.itemsize * int(np.prod(mapped.shape[1:]))
        self._file = path.open("rb")

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Reads the rows `start` to `stop - 1`."""
        self._file.seek(self._start + start * self._row_bytes)
        data = self._file.read((stop - start) * self._row_bytes)
        return np.frombuffer(data, self._dtype).reshape(-1, *self.shape[1:])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Reads the rows at `indices`, in that order."""
        rows = np.empty((len(indices), *self.shape[1:]), self._dtype)
        for position, index in enumerate(indices):
            rows[position] = self.slice(int(index), int(index) + 1)[0]
        return rows

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
