"""Causal language models of the Hugging Face Hub or a local folder, in full or with LoRA adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_qat.tasks.sources import import_optional, to_plain
from lightning_qat.tasks.tokenizing import load_auto


def load_causal_lm(
    name: str, lora: dict[str, Any] | None = None, dtype: str = "float32", revision: str | None = None
) -> nn.Module:
    """Return a pretrained causal language model, for :class:`~lightning_qat.tasks.CausalLMTask`.

    Args:
        name: Name on the Hub, or folder.
        lora: Arguments of ``peft.LoraConfig`` (``{"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}``): only
            adapters of that kind train. Default: all weights do.
        dtype: Type of the weights, whatever they were saved in: ``"float32"`` is what trains well.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: If there is no such model.
        ImportError: If transformers, or peft for ``lora``, is not installed.
        ValueError: If ``dtype`` is not the name of a floating-point type.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be the name of a floating-point type: 'float32' or 'bfloat16'.")
    model: nn.Module = load_auto("AutoModelForCausalLM", name, **({} if revision is None else {"revision": revision}))
    model = model.to(kind).train()
    model.config.use_cache = False  # type: ignore[union-attr]  # keys and values are of no use in whole sequences
    if lora is None:
        return model
    peft = import_optional("peft", "'lightning-qat[lora]'", "lora=")
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", **to_plain(lora)})
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted
