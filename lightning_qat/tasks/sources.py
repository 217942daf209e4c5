"""Where the data of a recipe come from: local files, folders, or data sets of the Hugging Face Hub by name."""

from __future__ import annotations

import glob
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# The readers of datasets by file ending; what else a folder holds (images), datasets finds out for itself.
READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_ENDINGS = ", ".join(READERS)
SOURCE_HELP = (
    f"Give files ({_ENDINGS}), a folder, or the name of a data set on the Hugging Face Hub that can be reached"
)


def load_source(
    source: str | Sequence[str],
    split: str = "train",
    config_name: str | None = None,
    *,
    streaming: bool = False,
    cache_dir: str | None = None,
    readers: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Return a split of a source as a ``datasets.Dataset``, or as an ``IterableDataset`` if streaming.

    Code from the Hub is never run.

    Args:
        source: Path or glob pattern of files, a list of these, a folder, or a name on the Hub.
        split: The split; files are all in ``train``.
        config_name: Configuration of a data set on the Hub.
        streaming: Read while iterating, instead of once into the cache of ``datasets``.
        cache_dir: Folder of the cache. Default: that of ``datasets``.
        readers: Arguments of readers by name (``{"csv": {"column_names": [...]}}``).

    Raises:
        FileNotFoundError: If there is no such file, folder or data set.
        ValueError: If the files are not of one known kind, or there is no such split.
    """
    import datasets

    common: dict[str, Any] = {"streaming": streaming, "cache_dir": cache_dir}
    if int(datasets.__version__.partition(".")[0]) < 4:  # later ones run none, and know no such argument
        common["trust_remote_code"] = False
    files = find_files(source)
    if files:
        reader = _reader_of(files)
        arguments = dict((readers or {}).get(reader, {}))
        return datasets.load_dataset(reader, data_files={"train": files}, split="train", **arguments, **common)
    try:
        return datasets.load_dataset(str(source), config_name, split=split, **common)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source!r} cannot be read: {error} {SOURCE_HELP}.") from error


def find_validation(
    train: str | list[str], validation: str | list[str] | None, val_split: str | None
) -> tuple[str | list[str] | None, str]:
    """Return source and split of the validation data; no source if a share of the training data is to be held out.

    Args:
        train: Where training data come from.
        validation: Where validation data come from. Default: from there too, if a split is named.
        val_split: The split. Default: ``validation``, or that of files, which are all in ``train``.
    """
    if validation is None:
        return (None if val_split is None else train), val_split or "validation"
    return validation, val_split or ("train" if find_files(validation) else "validation")


def find_files(source: str | Sequence[str]) -> list[str]:
    """Return the files that a source names, or none if it is a folder or a name.

    Raises:
        FileNotFoundError: If it can be nothing else than files, which are not there.
    """
    patterns = [source] if isinstance(source, str) else list(source)
    found: list[str] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        is_file = not isinstance(source, str) or Path(pattern).suffix in (*READERS, ".npy") or "*" in pattern
        if is_file and not any(Path(match).is_file() for match in matches):
            raise FileNotFoundError(f"There is no file {pattern!r} in {Path.cwd()}. {SOURCE_HELP}.")
        found += [match for match in matches if Path(match).is_file()]
    return found


def _reader_of(files: Sequence[str]) -> str:
    readers = {READERS.get(Path(file).suffix) for file in files}
    reader = readers.pop() if len(readers) == 1 else None
    if reader is None:
        endings = sorted({Path(file).suffix for file in files})
        raise ValueError(f"Files that end in {endings} cannot be read as one data set. {SOURCE_HELP}.")
    return reader


def check_column(dataset: Any, column: str, argument: str) -> None:
    """Check that there is a column of that name.

    Args:
        dataset: The data set.
        column: The column.
        argument: The argument that names it, for the message.

    Raises:
        ValueError: If there is none.
    """
    if dataset.column_names is not None and column not in dataset.column_names:
        raise ValueError(f"There is no column {column!r}, but {dataset.column_names}. Name it with {argument}=.")


def held_out(number: int, fraction: float, what: str) -> tuple[list[int], list[int]]:
    """Return which samples are for training, and which are held out for validation: random ones, always the same.

    Not the last ones, which often are all of one kind (folders of images are sorted by class), and the same whatever
    the seed of a run, so that runs with several seeds are validated on the same samples.

    Args:
        number: Samples.
        fraction: Share that is held out, of at least one sample.
        what: What the samples are, for the message.

    Raises:
        ValueError: If the share leaves nothing for training.
    """
    num_held = num_held_out(number, fraction, what)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0)).tolist()
    return sorted(order[num_held:]), sorted(order[:num_held])


def num_held_out(number: int, fraction: float, what: str) -> int:
    """Return how many of ``number`` samples are held out, at least one; arguments and errors as :func:`held_out`."""
    num_held = max(round(number * fraction), 1)
    if not 0 < fraction < 1 or num_held >= number:
        raise ValueError(
            f"val_fraction={fraction} of {number} {what} cannot be held out for validation. Give a share between 0 "
            "and 1 that leaves some for training, more data, or validation data (validation=, val_split=)."
        )
    return num_held


def to_plain(value: Any) -> Any:
    """Return lists and dictionaries in place of the sequences and mappings of a configuration."""
    if isinstance(value, Mapping):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(each) for each in value]
    return value


def import_optional(name: str, install: str, purpose: str) -> Any:
    """Return a package that is not always installed.

    Raises:
        ImportError: If it is not there; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {name}: pip install {install}") from error
