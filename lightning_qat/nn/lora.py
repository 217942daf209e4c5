"""PEFT's LoRA layer, quantized as it is deployed: ``fq(W + BA)``, not ``fq(W) + BA``.

Imported only where a model holds one, so that peft stays optional.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from lightning_qat.nn.fake_quantize import WeightFakeQuantize
from lightning_qat.nn.hf_conv1d import QATConv1D
from lightning_qat.nn.input_fake_quantize import InputFakeQuantize
from lightning_qat.nn.layers import QATLayer, QATLinear


class QATLoraLinear(QATLayer, LoraLinear):
    """A linear layer that computes with the fake-quantized sum of its weight and its adapters.

    That is what is deployed once the adapters are merged; codes are those of PEFT's own merge to the bit. Adapters get
    the gradient of the sum. With LoRA's dropout they get the one of LoRA, too: what dropout takes away from an
    adapter's input is taken away from the output in float, ``BA (dropout(x) - x)``, in training.
    """

    float_class = LoraLinear
    merged_class: ClassVar[type[QATLayer]] = QATLinear
    inner = "base_layer"  # where PEFT, when it saves adapters, does not take the quantizers for parts of them
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any

    @property
    def weight_fake_quant(self) -> WeightFakeQuantize:  # type: ignore[override]
        """Fake quantization of the sum."""
        quantizer: WeightFakeQuantize = self.base_layer.weight_fake_quant
        return quantizer

    @property
    def input_fake_quant(self) -> InputFakeQuantize | None:  # type: ignore[override]
        """Fake quantization of the input, or None."""
        quantizer: InputFakeQuantize | None = self.base_layer.input_fake_quant
        return quantizer

    @staticmethod
    def parameters_of(module: Any) -> tuple[nn.Parameter, ...]:
        """Return the frozen weight, and those of the adapters that are part of the sum."""
        factors = [each for name in _active_adapters(module) for each in _factors(module, name)]
        return (module.base_layer.weight, *factors)

    @staticmethod
    def weight_of(module: Any) -> Tensor:
        """Return the sum, in the dtype of the frozen weight, as PEFT merges it."""
        weight: Tensor = module.base_layer.weight
        # There is no autocast on the meta device.
        with contextlib.nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
            for name in _active_adapters(module):
                weight = (weight + module.get_delta_weight(name)).to(weight.dtype)
        return weight

    @torch.no_grad()
    def set_matrix(self, matrix: Tensor) -> None:
        """Let the sum be ``matrix`` ``[O, I]``: the weight takes it, and the adapters become zero."""
        super().set_matrix(matrix)
        for name in _active_adapters(self):
            self.lora_B[name].weight.zero_()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the layer under the adapters, with their sum as its weight, still fake-quantized to the same codes.

        PEFT's ``merge_and_unload`` and ``unload`` call this.

        Raises:
            ValueError: If the adapters are to be dropped: the grid is that of the sum.
        """
        if not merge:
            raise ValueError(
                "A quantized LoRA layer cannot drop its adapters, since its grid is that of the sum. Call "
                "restore_float(model) before unload(), or keep the adapters by merge_and_unload()."
            )
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self.base_layer.__class__ = self.merged_class
        base: nn.Module = self.base_layer
        return base

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``x`` ``[..., I]`` times the fake-quantized sum, plus the biases.

        Raises:
            ValueError: If each row has an adapter of its own (``adapter_names``): there is no one sum to quantize.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "A quantized LoRA layer has one weight for the whole batch. Leave adapter_names out, and choose an "
                "adapter by set_adapter."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()  # as in float
        x = self._input(x)
        weight, bias = self.to_matrix(self.fake_quantized_weight()), self.base_layer.bias
        names = _active_adapters(self)
        for name in names:
            if self.lora_bias[name]:
                of_adapter = self.lora_B[name].bias * self.scaling[name]
                bias = of_adapter.to(weight.dtype) if bias is None else bias + of_adapter.to(bias.dtype)
        output = F.linear(x, weight, bias)
        for name in names if self.training else ():
            if not isinstance(dropout := self.lora_dropout[name], nn.Identity):
                output = output + self._adapt(name, dropout(x) - x).to(output.dtype)
        return output

    def _adapt(self, name: str, x: Tensor) -> Tensor:
        down, up = _factors(self, name)
        scaling: float = self.scaling[name]
        return F.linear(F.linear(x.to(down.dtype), down), up) * scaling


class QATLoraConv1D(QATLoraLinear):
    """The same around Hugging Face's Conv1D, whose weight is stored ``[I, O]``."""

    merged_class = QATConv1D
    to_matrix = staticmethod(QATConv1D.to_matrix)
    from_matrix = staticmethod(QATConv1D.from_matrix)


def _active_adapters(module: Any) -> list[str]:
    """Return the adapters that a LoRA layer adds to its weight when it computes."""
    if module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def _factors(module: Any, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    return module.lora_A[name].weight, module.lora_B[name].weight
