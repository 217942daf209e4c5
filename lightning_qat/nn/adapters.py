"""Layers of PEFT, told by the names of their classes, so that peft is imported only where a model holds one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_qat.nn.layers import QATLayer, float_type, is_exactly, is_hf_conv1d

_MERGE = "merge it first (merge_and_unload) to quantize it"


def is_adapter_layer(module: nn.Module) -> bool:
    """Return whether ``module`` is a layer of PEFT: one around another, which changes what that computes."""
    return _is_peft_class(module, "BaseTunerLayer")


def is_adapted_model(module: nn.Module) -> bool:
    """Return whether PEFT has put its layers into ``module``, and frozen the rest."""
    return _is_peft_class(module, "PeftModel") or _is_peft_class(module, "BaseTuner")


def _is_peft_class(module: nn.Module, name: str) -> bool:
    return any(base.__name__ == name and base.__module__.startswith("peft.") for base in type(module).__mro__)


def find_adapter_class(module: Any) -> type[QATLayer] | None:
    """Return what a layer of PEFT turns into, or None."""
    if explain_adapter(module) is not None:
        return None
    from lightning_qat.nn import lora

    return lora.QATLoraLinear if type(module.base_layer) is nn.Linear else lora.QATLoraConv1D


def explain_adapter(module: Any) -> str | None:
    """Return why a layer of PEFT has no quantized form, or None if it has one.

    Raises:
        ValueError: If it was put around a layer that is quantized already.
    """
    kind = f"{float_type(module).__module__.split('.')[2]}.{float_type(module).__name__}"
    if not is_exactly(module, "peft.tuners.lora.layer", "Linear"):
        return f"no quantized form of {kind}: {_MERGE}"
    base = module.base_layer
    if isinstance(base, QATLayer):
        raise ValueError(
            "PEFT has put adapters around layers that are quantized already: fq(W) + BA is not what is deployed once "
            "they are merged. Call restore_float(model) first, then get_peft_model or add_adapter."
        )
    if type(base) is not nn.Linear and not is_hf_conv1d(base):
        return f"no quantized form of {kind} around {type(base).__name__}: only around Linear and Conv1D in float"
    if variants := sorted({type(each).__name__ for each in module.lora_variant.values()}):
        return f"no quantized form of LoRA as {', '.join(variants)}: use plain LoRA (use_dora=False), or {_MERGE}"
    return None


def parts_of_adapters(modules: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Return every module inside a layer of PEFT, with that layer: what it holds is quantized as one, or not at all."""
    return {part: module for module in modules if is_adapter_layer(module) for part in module.modules()}


def replaced_modules(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Return what PEFT's ``modules_to_save`` keeps of the modules that it has replaced by copies, which train."""
    wrappers: Iterable[Any] = (module for module in modules if _is_peft_class(module, "ModulesToSaveWrapper"))
    return {part for wrapper in wrappers for part in wrapper.original_module.modules()}
