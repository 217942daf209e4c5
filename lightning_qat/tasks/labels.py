"""Class labels of a data set, whether numbers, classes of ``datasets``, or names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_qat.tasks.sources import check_column


def find_label_column(dataset: Any, given: str | None) -> str:
    """Return the column of the labels: the given one, the only one of classes, or ``label`` or ``labels``.

    Raises:
        ValueError: If there is none, or more than one that it could be.
    """
    if given is not None:
        check_column(dataset, given, "label_column")
        return given
    classes = [name for name, kind in dataset.features.items() if type(kind).__name__ == "ClassLabel"]
    found = classes if len(classes) == 1 else [name for name in ("label", "labels") if name in dataset.column_names]
    if len(found) != 1:
        raise ValueError(f"Which of {dataset.column_names} are the labels? Name the column: label_column=.")
    return str(found[0])


def read_labels(dataset: Any, column: str, classes: list[str] | None) -> tuple[Tensor, list[str] | None]:
    """Return labels int64 ``[N]``, and the names of the classes if the labels are names.

    Args:
        dataset: A ``datasets.Dataset``.
        column: The column.
        classes: Names of the classes if they are known. Default: those that occur, in order.

    Raises:
        ValueError: If a label is missing, not a class, or unknown.
    """
    values = dataset.with_format(None)[column][:]
    missing = sum(value is None or value == -1 for value in values)
    if missing:
        raise ValueError(f"{missing} of {len(values)} images have no label in {column!r}. Use a split that has them.")
    if all(isinstance(value, str) for value in values):
        classes = sorted(set(values)) if classes is None else classes
        numbers = {name: number for number, name in enumerate(classes)}
        if unknown := sorted(set(values) - set(numbers)):
            raise ValueError(f"There are no training images of the classes {unknown[:5]}: drop them from validation.")
        values = [numbers[value] for value in values]
    array = np.asarray(values)
    if array.dtype.kind not in "iub" or array.ndim != 1 or array.min(initial=0) < 0:
        raise ValueError(f"The column {column!r} holds no classes: labels must be whole numbers from 0 on, or names.")
    return torch.from_numpy(array.astype(np.int64)), classes
