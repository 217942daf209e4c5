"""Checkpoints that load into the plain LightningModule, whatever other callbacks make of the state dict."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_qat.nn import quantized_layers
from lightning_qat.nn.state import STATE_KEY, load_quantizer_state, quantizer_prefixes, quantizer_state


def store_quantizers(
    checkpoint: dict[str, Any], pl_module: pl.LightningModule, progress: dict[str, Any], keep_in_state_dict: bool
) -> None:
    """Give the quantizers' state a key of its own in ``checkpoint``; to be called after all other hooks.

    Args:
        checkpoint: The checkpoint, whose ``state_dict`` may by now be that of a weight average.
        pl_module: The prepared module.
        progress: What the callback itself has to remember.
        keep_in_state_dict: Leave them in the state dict too.
    """
    if not quantized_layers(pl_module):  # taken out again with restore_float
        return
    state_dict = checkpoint["state_dict"]
    checkpoint[STATE_KEY] = {**quantizer_state(pl_module, state_dict), **progress}
    if not keep_in_state_dict:
        prefixes = quantizer_prefixes(pl_module)
        checkpoint["state_dict"] = {k: v for k, v in state_dict.items() if not k.startswith(prefixes)}


def restore_quantizers(checkpoint: dict[str, Any], pl_module: pl.LightningModule) -> None:
    """Restore what :func:`store_quantizers` stored, for the module and for callbacks that come after.

    Raises:
        ValueError: If it comes from other quantizers.
    """
    state = checkpoint[STATE_KEY]
    load_quantizer_state(pl_module, state)
    if "state_dict" in checkpoint:  # a sharded checkpoint has loaded it by now
        # Averaging callbacks load their copy of the model from the state dict.
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **state["quantizers"]}
