"""Arrays in .npy files, written row by row; they can be gone on with after a kill."""

import os
import pathlib

import numpy as np


class Column:
    """An .npy file `[N, *shape]` that grows; N need not be known before.

    It is written like any file and not through a memory map, where a full disk would
    kill the process instead of raising OSError.
    """

    def __init__(self, path: pathlib.Path, dtype, shape=(), rows: int = 0):
        """Opens `path` anew, or after its first `rows` rows, which are kept.

        Raises:
            ValueError: the file does not have so many rows.
        """
        self.dtype, self._shape, self.rows = np.dtype(dtype), tuple(shape), rows
        self._bytes = self.dtype.itemsize * int(np.prod(self._shape, dtype=np.int64))
        self._file = path.open("r+b" if rows else "wb")
        end = self._header() + rows * self._bytes
        if self._file.seek(0, os.SEEK_END) < end:
            self._file.close()
            raise ValueError(f"{path} has fewer than {rows} rows")
        self._file.seek(end)
        self._file.truncate()

    def add(self, rows: np.ndarray) -> None:
        """Appends rows `[n, *shape]`."""
        if rows.shape[1:] != self._shape or rows.dtype != self.dtype:
            raise ValueError(f"not rows of {self._shape}: {rows.shape}, {rows.dtype}")
        self._file.write(np.ascontiguousarray(rows).tobytes())
        self.rows += len(rows)

    def sync(self) -> None:
        """Brings all rows to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _header(self) -> int:
        # NumPy leaves room in the header for a first axis that grows.
        self._file.seek(0)
        entry = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *self._shape),
        }
        np.lib.format.write_array_header_1_0(self._file, entry)
        return self._file.tell()

    def __enter__(self) -> "Column":
        """Nothing to do: the file is open."""
        return self

    def __exit__(self, *error: object) -> None:
        """Writes the final header and closes the file."""
        with self._file:
            if error[0] is None:
                self._header()


class Rows:
    """Rows of an .npy file by their numbers, read without mapping the file.

    What a memory map has touched counts as this process's memory; this does not.
    """

    def __init__(self, path: pathlib.Path):
        """Opens the file."""
        mapped = np.load(path, mmap_mode="r")
        self.shape, self._dtype, self._start = mapped.shape, mapped.dtype, mapped.offset
        self._bytes = mapped.dtype.itemsize * int(np.prod(mapped.shape[1:]))
        self._file = path.open("rb")

    def __len__(self) -> int:
        """N, the number of rows."""
        return self.shape[0]

    def slice(self, first: int, last: int) -> np.ndarray:
        """The rows from `first` to before `last`."""
        self._file.seek(self._start + first * self._bytes)
        data = self._file.read((last - first) * self._bytes)
        return np.frombuffer(data, self._dtype).reshape(-1, *self.shape[1:])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows of these numbers, in their order."""
        out = np.empty((len(rows), *self.shape[1:]), self._dtype)
        for place, row in enumerate(rows):
            out[place] = self.slice(int(row), int(row) + 1)[0]
        return out

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
