"""Text of any source for language models: tokenized once and packed into rows of one length, without padding."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_qat.tasks.fine_tuning_data import FineTuningData
from lightning_qat.tasks.flat_rows import FlatRows, map_once, open_arrays, open_column
from lightning_qat.tasks.sources import check_column, find_files, find_validation, load_source, num_held_out, to_plain
from lightning_qat.tasks.text_stream import PackedStream
from lightning_qat.tasks.tokenizing import load_tokenizer, tokenize, tokenizer_key


class PackedTextDataModule(FineTuningData):
    """Rows of token ids, int64 ``[B, sequence_length]``, of which a task predicts all but the first.

    Documents follow one another, each with the end-of-text token behind it; empty ones are left out. Every token is in
    one row, except for less than a row at the end of the data. The tokens are computed once, and lie in the
    memory-mapped cache of ``datasets``; calling for the same again reads them from there.

    Args:
        train: Files (``.txt``, ``.json``, ``.jsonl``, ``.csv``, ``.parquet``), a folder, or the name of a data set on
            the Hub; or ``.npy`` files of token ids, a stream ``[N]`` or rows ``[N, sequence_length]``, taken as it is.
        tokenizer: Name on the Hub, or folder, of the model's tokenizer; not needed for ``.npy`` files.
        validation: Validation data, in the same ways. Default: those in ``val_split``, or ``val_fraction``.
        config_name: Configuration of a data set on the Hub.
        train_split: Split of ``train`` to train on.
        val_split: Split to validate on.
        val_fraction: Share of the rows that is held out where there are no validation data: the last ones, so that at
            most one document is in both.
        text_column: Column with the text.
        sample_by: What is a document in ``.txt`` files: ``"document"`` (a file), ``"paragraph"`` or ``"line"``.
        sequence_length: Tokens per row.
        batch_size: Rows per batch.
        eos_token: The end-of-text token. Default: that of the tokenizer.
        streaming: Tokenize while training instead, nothing is cached; for data that do not fit on the disk. Documents
            are shuffled in a buffer, and validation data must be given.
        shuffle_buffer: Documents in that buffer.
        num_workers: Processes that load batches.
        num_proc: Processes that tokenize.
        seed: Seed of the order of training rows.
        cache_dir: Folder of the cache. Default: that of ``datasets``.
    """

    samples = "rows"

    def __init__(
        self,
        train: str | list[str],
        tokenizer: str | None = None,
        validation: str | list[str] | None = None,
        config_name: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.05,
        text_column: str = "text",
        sample_by: str = "document",
        sequence_length: int = 256,
        batch_size: int = 8,
        eos_token: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if sequence_length < 2:
            raise ValueError(f"sequence_length={sequence_length}: a row needs a token to predict. Give at least 2.")
        self.train, self.validation = to_plain(train), to_plain(validation)
        self.tokenizer, self.eos_token, self.text_column = tokenizer, eos_token, text_column
        self.config_name, self.train_split, self.val_split = config_name, train_split, val_split
        self.val_fraction, self.sample_by, self.sequence_length = val_fraction, sample_by, sequence_length
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.num_proc, self.cache_dir = num_proc, cache_dir

    def load(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Return training and validation rows.

        Raises:
            FileNotFoundError: If a source is not there.
            ValueError: If data or arguments do not fit together.
        """
        validation, val_split = find_validation(self.train, self.validation, self.val_split)
        if self.streaming:
            return self._stream(self.train, self.train_split, True), self._val_stream(validation, val_split)
        train = self._rows(self.train, self.train_split)
        if validation is not None:
            return train, self._rows(validation, val_split)
        split = len(train) - num_held_out(len(train), self.val_fraction, f"rows of {self.sequence_length} tokens")
        return train.part(0, split), train.part(split, len(train))

    def hashed_parts(self) -> Iterable[bytes]:
        """Return the token ids, or of streams where they come from."""
        for data in (self.train_data, self.val_data):
            assert isinstance(data, (FlatRows, PackedStream))
            yield from data.hashed_parts()

    def _rows(self, source: str | list[str], split: str) -> FlatRows:
        files = find_files(source)
        if any(Path(file).suffix == ".npy" for file in files):
            self._check_arrays(files)
            rows = FlatRows(functools.partial(open_arrays, files), self.sequence_length, torch.int64)
        else:
            tokens = self._tokenize(source, split)
            rows = FlatRows(functools.partial(open_column, tokens, "tokens"), self.sequence_length, torch.int64)
        if not len(rows):
            raise ValueError(
                f"{source!r} has less than one row of {self.sequence_length} tokens. "
                "Use a smaller sequence_length or more text."
            )
        return rows

    def _tokenize(self, source: str | list[str], split: str) -> Any:
        """Return a ``datasets.Dataset`` with a list of token ids for each document."""
        from datasets import Sequence, Value

        documents = self._documents(source, split)
        tokenizer, eos = load_tokenizer(self.tokenizer, self.eos_token)
        return map_once(
            documents.select_columns([self.text_column]),
            tokenize,
            {"tokenizer": tokenizer, "eos": eos, "column": self.text_column},
            [*tokenizer_key(tokenizer), eos, self.text_column],
            {"tokens": Sequence(Value("int32"))},
            "Tokenizing",
            self.num_proc,
        )

    def _documents(self, source: str | list[str], split: str) -> Any:
        """Return the documents as ``datasets`` has them."""
        readers = {"text": {"sample_by": self.sample_by}}
        arguments: dict[str, Any] = {"streaming": self.streaming, "cache_dir": self.cache_dir, "readers": readers}
        documents = load_source(source, split, self.config_name, **arguments)
        check_column(documents, self.text_column, "text_column")
        return documents

    def _stream(self, source: str | list[str], split: str, is_training: bool) -> PackedStream:
        if any(Path(file).suffix == ".npy" for file in find_files(source)):
            raise ValueError(".npy files are memory-mapped as they are; leave streaming=True out.")
        documents, buffer = self._documents(source, split), self.shuffle_buffer
        tokenizer, eos = load_tokenizer(self.tokenizer, self.eos_token)
        return PackedStream(
            documents.shuffle(seed=self.seed, buffer_size=buffer) if is_training else documents,
            functools.partial(tokenize, tokenizer=tokenizer, eos=eos, column=self.text_column),
            self.text_column,
            self.sequence_length,
            f"{source} {self.config_name} {split} {self.tokenizer}",
        )

    def _val_stream(self, source: str | list[str] | None, split: str) -> PackedStream:
        if source is None:
            raise ValueError("No share of a stream can be held out: give validation= or val_split=.")
        return self._stream(source, split, False)

    def _check_arrays(self, files: list[str]) -> None:
        for file in files:
            if Path(file).suffix != ".npy":
                raise ValueError(f"{file!r} is no .npy file, unlike others of {files}. Give files of one kind.")
            array = np.load(file, mmap_mode="r")
            if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
                raise ValueError(
                    f"{file!r} holds {array.dtype} {list(array.shape)}, not token ids: save whole numbers, as a stream "
                    "[N] or as rows [N, T]."
                )
            if array.ndim == 2 and array.shape[1] != self.sequence_length:
                raise ValueError(
                    f"{file!r} has rows of {array.shape[1]} tokens. Give sequence_length={array.shape[1]}, or save it "
                    "as a stream [N] if it may be cut elsewhere."
                )
