"""Byte-level text for language modelling, from what every Python carries: no network, no account."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from lightning_qat.tasks.fine_tuning_data import FineTuningData

Corpus = Literal["python_topics", "python_docstrings"]


class TextDataModule(FineTuningData):
    """Windows of bytes, as int64 ``[B, block_size + 1]``; the last part of the text is for validation.

    Args:
        corpus: ``"python_topics"``, the language reference in ``pydoc_data.topics`` (0.46 MB in Python 3.11),
            ``"python_docstrings"``, which adds those of the standard library, or the path of a text file.
        block_size: Tokens that are predicted per window.
        batch_size: Windows per batch.
        stride: Distance between the starts of neighbouring training windows.
        val_fraction: Share of the text for validation, whose windows do not overlap.
        seed: Seed of the order of training windows.
    """

    samples = "windows"

    def __init__(
        self,
        corpus: Corpus | str = "python_topics",
        block_size: int = 128,
        batch_size: int = 32,
        stride: int = 32,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers=0, seed=seed)
        self.corpus, self.block_size = corpus, block_size
        self.stride, self.val_fraction = stride, val_fraction
        self.text = read_corpus(corpus)

    def load(self) -> tuple[Any, Any]:
        """Return the windows that the text is cut into."""
        split = int(len(self.text) * (1 - self.val_fraction))
        train, val = self.text[:split], self.text[split:]
        return _windows(train, self.block_size, self.stride), _windows(val, self.block_size, self.block_size)

    def hashed_parts(self) -> Iterable[bytes]:
        """Return the text, which differs a little between Python versions."""
        return [self.text]

    def collate(self, is_training: bool) -> Callable[[list[Any]], Tensor]:
        """Return what makes a batch of windows."""
        return _collate


def read_corpus(corpus: Corpus | str) -> bytes:
    """Return the text of a corpus as bytes.

    Raises:
        FileNotFoundError: If it is neither known nor the path of a file.
    """
    if corpus == "python_topics":
        return _topics()
    if corpus == "python_docstrings":
        return _docstrings() + _topics()
    path = Path(corpus)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {corpus!r}. Give a path, 'python_topics' or 'python_docstrings'.")
    return path.read_bytes()


def _topics() -> bytes:
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()


def _docstrings() -> bytes:
    """Return the docstrings of the standard library, read from its source without importing it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "test", "tests"} & set(path.relative_to(root).parts):
            texts.extend(_docstrings_of(path))
    return "".join(f"{text}\n\n" for text in texts).encode()


def _docstrings_of(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 and others ship files that are not Python 3 on purpose
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in found if text]


def _windows(text: bytes, block_size: int, stride: int) -> Dataset:
    tokens = np.frombuffer(text, dtype=np.uint8)
    if len(tokens) <= block_size:
        raise ValueError(f"The text has {len(tokens)} bytes, too few for a window of {block_size + 1}. Use more text.")
    windows = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[::stride]
    return Dataset.from_dict({"tokens": list(windows)}).with_format("numpy")


def _collate(rows: list[dict[str, np.ndarray]]) -> Tensor:
    return torch.from_numpy(np.stack([row["tokens"] for row in rows]).astype(np.int64))
