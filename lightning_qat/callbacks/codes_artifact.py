"""The quantized weights of a run as a W&B artifact: integer codes, scales and zero-points."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_qat.callbacks.wandb_runs import for_each_run, has_wandb
from lightning_qat.core import QuantizedWeight
from lightning_qat.nn import quantized_weights
from lightning_qat.nn.bits import bit_report

_FILE = "codes.safetensors"


def check_can_save_codes(log_codes: bool) -> None:
    """Check the argument before a long run ends without what it was asked for.

    Raises:
        TypeError: If it is not a bool.
        ValueError: If codes cannot be saved here.
    """
    if not isinstance(log_codes, bool):
        raise TypeError(f"log_codes={log_codes!r} must be True or False.")
    if log_codes and importlib.util.find_spec("safetensors") is None:
        raise ValueError("log_codes=True needs safetensors, which is not installed: pip install safetensors")


def warn_without_wandb(trainer: pl.Trainer) -> None:
    """Say so if nobody takes the codes."""
    if not has_wandb(trainer):
        rank_zero_warn("log_codes=True has no effect without WandbLogger. quantized_weights(model) returns the codes.")


def log_codes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Log an artifact with the codes of ``pl_module``; to be called in all processes, which may share the weights."""
    if not has_wandb(trainer):
        return
    try:
        weights = quantized_weights(pl_module)
    except ValueError as error:
        rank_zero_warn(f"No codes are logged to W&B. {error}")
        return
    bits = bit_report(pl_module)
    metadata = {
        "schemes": sorted({str(weight.scheme) for weight in weights.values()}),
        "effective_bits": bits.quantized,
        "model_bits": bits.model,
        "step": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }

    def log_to(_: Any, run: Any) -> None:
        import wandb

        artifact = wandb.Artifact(f"quantized-model-{run.id}", type="quantized-model", metadata=metadata)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, _FILE)
            save_codes(weights, path)
            artifact.add_file(str(path), name=_FILE)  # makes a copy of its own
        run.log_artifact(artifact)

    for_each_run(trainer, log_to)


def save_codes(weights: Mapping[str, QuantizedWeight], path: Path) -> None:
    """Write a safetensors file with ``<layer>.codes``, ``.scale``, and ``.zero_point`` where there is one.

    The schemes of the layers are in its metadata as JSON. A weight is ``(codes - zero_point + zero_offset) * scale``,
    the offset being that of its scheme.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, weight in weights.items():
        parts = {"codes": weight.codes, "scale": weight.params.scale, "zero_point": weight.params.zero_point}
        for part, tensor in parts.items():
            if tensor is not None:
                tensors[f"{name}.{part}"] = tensor.detach().cpu().clone().contiguous()  # tied layers share none
    schemes = {name: weight.scheme.to_dict() for name, weight in weights.items()}
    save_file(tensors, path, metadata={"schemes": json.dumps(schemes)})
