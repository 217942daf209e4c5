"""Text that is tokenized while it is read, packed into rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

DOCUMENTS_AT_ONCE = 64


class PackedStream(IterableDataset[Tensor]):
    """Rows of token ids ``[row_length]``, int64, of a streamed data set; every process reads its share.

    Less than a row is left out at the end of a process's share. The order of documents is another in every epoch.

    Args:
        documents: A ``datasets.IterableDataset``.
        tokenize: Takes a batch of documents, returns a list of token ids for each as ``tokens``.
        column: Column with the text.
        row_length: Tokens per row.
        name: Where the documents come from.
    """

    def __init__(
        self,
        documents: Any,
        tokenize: Callable[[Mapping[str, list[str | None]]], dict[str, list[Any]]],
        column: str,
        row_length: int,
        name: str,
    ) -> None:
        self.documents, self.tokenize, self.column = documents, tokenize, column
        self.row_length, self.name = row_length, name
        self._epoch = 0

    def __iter__(self) -> Iterator[Tensor]:
        documents = self._own_share()
        documents.set_epoch(self._next_epoch())
        rest = np.zeros(0, dtype=np.int64)
        texts = (document[self.column] for document in documents)
        while batch := list(islice(texts, DOCUMENTS_AT_ONCE)):
            rest = np.concatenate([rest, *self.tokenize({self.column: batch})["tokens"]])
            num_rows = len(rest) // self.row_length
            yield from torch.from_numpy(rest[: num_rows * self.row_length].reshape(num_rows, -1).copy())
            rest = rest[num_rows * self.row_length :]

    def hashed_parts(self) -> Iterator[bytes]:
        """Yield what the stream is called: what it holds is not known before it is read."""
        yield f"{self.name} {self.row_length}".encode()

    def _own_share(self) -> Any:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.documents  # which deals itself out to the workers of a loader
        from datasets.distributed import split_dataset_by_node

        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return split_dataset_by_node(self.documents, rank, world_size)

    def _next_epoch(self) -> int:
        """Return a number that is another each time, and the same in all workers of a loader."""
        worker = get_worker_info()
        if worker is not None:  # a copy that knows nothing of earlier epochs, but of the loader's generator
            return (worker.seed - worker.id) % 2**31
        self._epoch += 1
        return self._epoch - 1
