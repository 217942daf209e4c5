"""Samples of one size over long memory-mapped arrays, and the transformations that fill these, done once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

CACHE_VERSION = 1  # to be raised when what is mapped comes out otherwise, so that older caches are left alone


class FlatRows(Dataset[Tensor]):
    """Rows of one length of a stream of numbers that lies in several arrays one after the other, read when asked for.

    A row may begin in one array and end in another; what is left over at the end of the stream is less than a row and
    belongs to none. Nothing is held in memory, and a copy that goes to a worker opens the arrays again.

    Args:
        open_chunks: Returns the arrays, each ``[N]``, memory-mapped or not; can be pickled.
        row_length: Numbers per row.
        dtype: Type of the rows.
        start: First row.
        stop: Row behind the last. Default: all.
    """

    def __init__(
        self,
        open_chunks: Callable[[], Sequence[np.ndarray]],
        row_length: int,
        dtype: torch.dtype,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.open_chunks, self.row_length, self.dtype = open_chunks, row_length, dtype
        self._chunks: list[np.ndarray] = []
        self._ends = np.zeros(0, dtype=np.int64)
        self._open()
        most = (int(self._ends[-1]) if len(self._ends) else 0) // row_length
        self.start, self.stop = start, most if stop is None else stop

    def part(self, start: int, stop: int) -> FlatRows:
        """Return the rows from ``start`` up to ``stop``."""
        return FlatRows(self.open_chunks, self.row_length, self.dtype, self.start + start, self.start + stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Tensor:
        """Return a row, ``[row_length]``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} rows, so there is no row {index}.")
        first = (self.start + index % len(self)) * self.row_length
        row = torch.empty(self.row_length, dtype=self.dtype)
        filled = 0
        for piece in self._pieces(first, first + self.row_length):
            row.numpy()[filled : filled + len(piece)] = piece
            filled += len(piece)
        return row

    def hashed_parts(self) -> Iterator[bytes]:
        """Yield what the rows hold, piece by piece."""
        yield f"{len(self)} rows of {self.row_length}".encode()
        for piece in self._pieces(self.start * self.row_length, self.stop * self.row_length):
            for block in np.array_split(piece, len(piece) // 2**20 + 1):
                yield block.astype(np.int32).tobytes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": []}

    def _open(self) -> None:
        self._chunks = [chunk for chunk in self.open_chunks() if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)

    def _pieces(self, first: int, end: int) -> Iterator[np.ndarray]:
        """Yield the parts of the arrays that hold the numbers from ``first`` up to ``end``."""
        if not self._chunks:
            self._open()
        number = int(np.searchsorted(self._ends, first, side="right"))
        while first < end:
            chunk, chunk_end = self._chunks[number], int(self._ends[number])
            begin = first - (chunk_end - len(chunk))
            piece = chunk[begin : begin + end - first]
            yield piece
            first, number = first + len(piece), number + 1


def open_column(dataset: Any, column: str) -> list[np.ndarray]:
    """Return the numbers in a column of lists as flat views into the Arrow cache, without copying them.

    Args:
        dataset: A ``datasets.Dataset`` whose rows are in the order of its table.
        column: The column.
    """
    chunks = dataset.data.column(column).chunks
    return [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks]


def open_arrays(paths: Sequence[str]) -> list[np.ndarray]:
    """Return the numbers in ``.npy`` files as flat views, memory-mapped."""
    return [np.load(path, mmap_mode="r").reshape(-1) for path in paths]


def map_once(
    dataset: Any,
    function: Callable[..., Mapping[str, Any]],
    arguments: Mapping[str, Any],
    key: Sequence[Any],
    features: Mapping[str, Any],
    what: str,
    num_proc: int | None = None,
) -> Any:
    """Return ``dataset.map`` of batches, from the cache if the same was computed before.

    The name in the cache is computed from what makes a difference. ``datasets`` would take it from the pickled
    function, but a tokenizer keeps traces of earlier calls, so that the same work would be done again.

    Args:
        dataset: A ``datasets.Dataset`` of the columns that the function needs, none of which stays.
        function: Takes a batch and the arguments, returns columns.
        arguments: Further arguments of the function.
        key: Plain values that say, with the data, what comes out.
        features: The columns that come out, and their types.
        what: What is done, for the progress bar.
        num_proc: Processes.
    """
    from datasets import Features
    from datasets.fingerprint import Hasher

    fingerprint = Hasher.hash([dataset._fingerprint, function.__qualname__, CACHE_VERSION, *map(str, key)])
    return dataset.map(
        function,
        batched=True,
        fn_kwargs=dict(arguments),
        remove_columns=dataset.column_names,
        features=Features(features),
        new_fingerprint=fingerprint,
        num_proc=num_proc,
        desc=what,
    )
