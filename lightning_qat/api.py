"""The plugin without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_qat.core import GradientEstimator, Observer
from lightning_qat.nn import QATLayer
from lightning_qat.nn.state import STATE_KEY, rebuild

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_qat(
    module: ModuleT,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    observer: Observer | None = None,
    estimator: GradientEstimator | None = None,
    mapping: Mapping[type[nn.Module], type[QATLayer]] | None = None,
    weights_only: bool = True,
) -> ModuleT:
    """Load a checkpoint of a run with ``QATCallback`` into a plain ``module``, quantizers included.

    A plain ``load_state_dict`` would give the float weights that the run kept underneath, which score better
    or worse than the quantized model that was trained.

    Args:
        module: The LightningModule (or whatever was the root of the run), in float; it is changed in place. If it
            has a ``configure_model``, that is called, and its ``strict_loading`` is respected.
        checkpoint: Path of the checkpoint, or its content.
        observer: The observer of the run, if it is not one of the registry.
        estimator: The estimator of the run, likewise.
        mapping: The ``mapping`` of the run, if it had one.
        weights_only: Passed to :func:`torch.load`; False for a trusted file that holds other objects, such as
            hyper-parameters of custom classes.

    Returns:
        ``module``.

    Raises:
        ValueError: If the checkpoint is not of such a run or does not fit the module.
    """
    content: Mapping[str, Any]
    if isinstance(checkpoint, Mapping):
        content = checkpoint
    else:
        content = torch.load(checkpoint, map_location="cpu", weights_only=weights_only)
    if STATE_KEY not in content:
        raise ValueError(_explain_missing_state(content.get("state_dict", content)))
    if callable(configure_model := getattr(module, "configure_model", None)):
        configure_model()
    quantizers = content[STATE_KEY]["quantizers"]  # sharded strategies keep them in the state dict, too
    _load_floats(module, {key: value for key, value in content["state_dict"].items() if key not in quantizers})
    rebuild(module, content[STATE_KEY], observer, estimator, mapping)
    return module


def _explain_missing_state(state_dict: Mapping[str, Any]) -> str:
    if any(".weight_fake_quant." in key for key in state_dict):
        return (
            "The checkpoint was saved with save_weights_only=True: it holds weights and grids, but not which layers "
            "were quantized how. Prepare the module as the callback did, then load: QATCallback(...).prepare(module); "
            "module.load_state_dict(checkpoint['state_dict'])."
        )
    return (
        f"The checkpoint has no {STATE_KEY!r} entry: it was not saved with QATCallback. Load it with "
        "module.load_state_dict(checkpoint['state_dict'])."
    )


def _load_floats(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    try:
        module.load_state_dict(state_dict, strict=getattr(module, "strict_loading", True))
    except RuntimeError as error:
        raise ValueError(
            f"The checkpoint does not fit the module. Build it as in that run; layers made in setup() must be there "
            f"before load_qat. {error}"
        ) from error
