"""Pairs of sentences with a score of how alike they are, tokenized once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_qat.tasks.fine_tuning_data import FineTuningData
from lightning_qat.tasks.flat_rows import map_once
from lightning_qat.tasks.sources import check_column, find_validation, held_out, load_source, to_plain
from lightning_qat.tasks.tokenizing import load_auto, tokenizer_key


class SentencePairDataModule(FineTuningData):
    """Batches of tokens, int64 ``[2 B, T]`` by name, and ``score``, float32 ``[2 B]``; see ``SentenceEmbeddingTask``.

    ``T`` is the longest sentence of the batch. Sentences are tokenized once, into the memory-mapped cache of
    ``datasets``.

    Args:
        train: Files (``.csv``, ``.jsonl``, ``.parquet``), a folder, or the name of a data set on the Hub.
        tokenizer: Name on the Hub, or folder, of the encoder's tokenizer.
        validation: Validation data, in the same ways. Default: those in ``val_split``, or ``val_fraction``.
        config_name: Configuration of a data set on the Hub.
        train_split: Split of ``train`` to train on.
        val_split: Split to validate on.
        val_fraction: Share of the pairs that is held out where there are no validation data, the same for all seeds.
        sentence_columns: Columns of the two sentences.
        score_column: Column of the score.
        csv_columns: Names of the columns of ``.csv`` files whose first line is not these.
        score_min: Score of sentences that have nothing in common, whose cosine shall be 0.
        score_max: Score of sentences that mean the same, whose cosine shall be 1.
        max_length: Tokens of a sentence behind which it is cut off.
        batch_size: Pairs per batch.
        num_workers: Processes that load batches.
        num_proc: Processes that tokenize.
        seed: Seed of the order of training pairs.
        cache_dir: Folder of the cache. Default: that of ``datasets``.

    Raises:
        ValueError: If there are not two columns of sentences, or the scale of scores is empty.
    """

    samples = "pairs"

    def __init__(
        self,
        train: str | list[str],
        tokenizer: str,
        validation: str | list[str] | None = None,
        config_name: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.1,
        sentence_columns: list[str] | tuple[str, ...] = ("sentence1", "sentence2"),
        score_column: str = "score",
        csv_columns: list[str] | None = None,
        score_min: float = 0.0,
        score_max: float = 5.0,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if len(sentence_columns) != 2 or score_max <= score_min:
            raise ValueError(
                f"sentence_columns={list(sentence_columns)} must be two columns, and score_max={score_max} larger than "
                f"score_min={score_min}."
            )
        self.train, self.validation, self.tokenizer = to_plain(train), to_plain(validation), tokenizer
        self.config_name, self.train_split, self.val_split = config_name, train_split, val_split
        self.val_fraction, self.score_column = val_fraction, score_column
        self.sentence_columns, self.csv_columns = tuple(sentence_columns), to_plain(csv_columns)
        self.score_min, self.score_max, self.max_length = score_min, score_max, max_length
        self.num_proc, self.cache_dir = num_proc, cache_dir
        self._padding: dict[str, int] = {}

    def load(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Return training and validation pairs, tokenized.

        Raises:
            FileNotFoundError: If a source is not there.
            ValueError: If columns or values are missing, or a score is outside its scale.
        """
        tokenizer = load_auto("AutoTokenizer", self.tokenizer)
        self._padding = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
        validation, val_split = find_validation(self.train, self.validation, self.val_split)
        train = self._read(self.train, self.train_split, tokenizer)
        if validation is not None:
            return train, self._read(validation, val_split, tokenizer)
        kept, held = held_out(len(train), self.val_fraction, "pairs")
        return train.select(kept), train.select(held)

    def hashed_parts(self) -> Iterable[bytes]:
        """Return tokens and scores."""
        for data in (self.train_data, self.val_data):
            yield f"{len(data)} pairs".encode()  # type: ignore[arg-type]
            for pair in data:  # type: ignore[attr-defined]
                yield from (np.asarray(pair[column]).tobytes() for column in ("first_input_ids", "second_input_ids"))
                yield np.float32(pair["score"]).tobytes()

    def collate(self, is_training: bool) -> Callable[[list[Any]], Any]:
        """Return what pads the sentences of a batch to the longest."""
        self.setup("fit")
        return PairBatch(self._padding)

    def _read(self, source: str | list[str], split: str, tokenizer: Any) -> Any:
        from datasets import Sequence as ListOf
        from datasets import Value

        csv: dict[str, Any] = {"keep_default_na": False}  # "None" and "NA" may be all that a sentence says
        if self.csv_columns is not None:
            csv["column_names"] = self.csv_columns
        dataset = load_source(source, split, self.config_name, cache_dir=self.cache_dir, readers={"csv": csv})
        for column in self.sentence_columns:
            check_column(dataset, column, "csv_columns= (for files without a first line of names) or sentence_columns")
        check_column(dataset, self.score_column, "score_column")
        inputs = tokenizer.model_input_names
        scale = (self.score_min, self.score_max)
        pairs = map_once(
            dataset.select_columns([*self.sentence_columns, self.score_column]),
            tokenize_pairs,
            {
                "tokenizer": tokenizer,
                "columns": (*self.sentence_columns, self.score_column),
                "scale": scale,
                "max_length": self.max_length,
            },
            [*tokenizer_key(tokenizer), *self.sentence_columns, self.score_column, *scale, self.max_length],
            {
                **{f"{which}_{name}": ListOf(Value("int32")) for which in ("first", "second") for name in inputs},
                "score": Value("float32"),
            },
            "Tokenizing",
            self.num_proc,
        )
        return pairs.with_format("numpy")


def tokenize_pairs(
    batch: Mapping[str, list[Any]],
    tokenizer: Any,
    columns: tuple[str, str, str],
    scale: tuple[float, float],
    max_length: int,
) -> dict[str, list[Any]]:
    """Return the tokens of both sentences, and scores in 0 to 1.

    Args:
        batch: Sentences and scores.
        tokenizer: The tokenizer.
        columns: Columns of the first sentence, the second, and the score.
        scale: Scores that become 0 and 1.
        max_length: Most tokens of a sentence.

    Raises:
        ValueError: If a value is missing, or a score is not on the scale.
    """
    *sentence_columns, score_column = columns
    for column in columns:
        if missing := sum(value is None for value in batch[column]):
            raise ValueError(
                f"{missing} pairs have nothing in the column {column!r}. Leave these pairs out of the data."
            )
    scores = (np.asarray(batch[score_column], dtype=np.float64) - scale[0]) / (scale[1] - scale[0])
    if not ((scores >= 0) & (scores <= 1)).all():
        worst = max(batch[score_column], key=lambda score: abs((score - scale[0]) / (scale[1] - scale[0]) - 0.5))
        raise ValueError(f"A score is {worst}, not in {scale[0]} to {scale[1]}: give score_min= and score_max=.")
    result: dict[str, list[Any]] = {"score": scores.tolist()}
    for which, column in zip(("first", "second"), sentence_columns, strict=True):
        sentences = [str(sentence) for sentence in batch[column]]
        encoded = tokenizer(sentences, truncation=True, max_length=max_length)
        result.update({f"{which}_{name}": encoded[name] for name in tokenizer.model_input_names})
    return result


@dataclass(frozen=True)
class PairBatch:
    """Makes a batch of pairs, the two sentences of each one after the other.

    Args:
        padding: What is put behind sentences, by input; zeros where nothing is said.
    """

    padding: Mapping[str, int]

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the inputs, int64 ``[2 B, T]``, and ``score``, float32 ``[2 B]``."""
        names = [key.removeprefix("first_") for key in pairs[0] if key.startswith("first_")]
        batch = {name: self._pad(pairs, name) for name in names}
        scores = torch.tensor([float(pair["score"]) for pair in pairs], dtype=torch.float32)
        return {**batch, "score": scores.repeat_interleave(2)}

    def _pad(self, pairs: Sequence[Mapping[str, Any]], name: str) -> Tensor:
        rows = [pair[f"{which}_{name}"] for pair in pairs for which in ("first", "second")]
        padded = torch.full((len(rows), max(1, *map(len, rows))), self.padding.get(name, 0), dtype=torch.int64)
        for row, tokens in zip(padded, rows, strict=True):
            row[: len(tokens)] = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
        return padded
