"""The layers that a float layer turns into, by a change of its class.

The Parameter objects, their names and everything else about the module stay as they are; only the
children ``weight_fake_quant`` and ``input_fake_quant`` are added.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.core import QuantizedWeight
from lightning_qat.nn.fake_quantize import WeightFakeQuantize
from lightning_qat.nn.input_fake_quantize import InputFakeQuantize
from lightning_qat.nn.sharded import gathered


class QATLayer(nn.Module):
    """What all fake-quantized layers share.

    To support another layer, subclass this and the layer, set ``float_class``, and pass
    ``mapping={YourLayer: QATYourLayer}`` to the callback.

    Attributes:
        float_class: The class of the layer without fake quantization.
        sample_dims: Trailing dimensions of an input that share a scale when activations are quantized.
        inner: Name of the child that stores the weight and holds the quantizers, ``""`` for the layer itself.
        weight_fake_quant: Fake quantization of the weight; the same object in layers that share a weight.
        input_fake_quant: Fake quantization of the input, or None.
    """

    float_class: ClassVar[type[nn.Module]]
    sample_dims: ClassVar[int] = 1
    inner: ClassVar[str] = ""
    weight: Tensor
    weight_fake_quant: WeightFakeQuantize
    input_fake_quant: InputFakeQuantize | None

    @staticmethod
    def parameters_of(module: nn.Module) -> tuple[nn.Parameter, ...]:
        """Return the parameters that make up the weight of ``module``, which may be in float, the stored one first.

        Empty if its weight is computed by other means.
        """
        weight = module._parameters.get("weight")
        return () if weight is None else (weight,)

    @staticmethod
    def weight_of(module: nn.Module) -> Tensor:
        """Return the weight that ``module``, which may be in float, computes with, in the layout of the stored one."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """Return the weight as ``[O, I]``: output channels by what each of them sums over."""
        return weight.flatten(1)

    @staticmethod
    def from_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
        """Return ``matrix`` ``[O, I]`` in the layout of ``weight``."""
        return matrix.view_as(weight)

    def matrix(self) -> Tensor:
        """Return the float weight as ``[O, I]``."""
        return self.to_matrix(self.weight_of(self))

    def whole_matrix(self) -> Tensor:
        """Return the float weight as ``[O, I]``, for what looks at it outside the layer's own forward pass.

        If it is spread over processes, all must call this.
        """
        return self.to_matrix(gathered(self.weight_of(self)))

    @torch.no_grad()
    def set_matrix(self, matrix: Tensor) -> None:
        """Let the float weight be ``matrix`` ``[O, I]``."""
        self.weight.copy_(self.from_matrix(matrix, self.weight))

    def fake_quantized_weight(self) -> Tensor:
        """Return the weight as the layer uses it, in its own layout and dtype."""
        return self.from_matrix(self.weight_fake_quant(self.matrix()), self.weight)

    def quantized_weight(self) -> QuantizedWeight:
        """Return codes and grid of the weight on the current rung."""
        return self.weight_fake_quant.quantize(self.whole_matrix())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Let the quantizers, which see only their own entries, know whether the weight is loaded."""
        name = f"{self.inner}.weight".removeprefix(".")
        for quantizer in (self.weight_fake_quant, self.input_fake_quant):
            if quantizer is not None:
                quantizer.loads_weight = f"{prefix}{name}" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _input(self, x: Tensor) -> Tensor:
        return x if self.input_fake_quant is None else self.input_fake_quant(x)


class QATLinear(QATLayer, nn.Linear):
    """A linear layer that computes with its fake-quantized weight."""

    float_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` ``[..., I]`` times the fake-quantized weight, plus the bias."""
        return F.linear(self._input(input), self.fake_quantized_weight(), self.bias)


class QATEmbedding(QATLayer, nn.Embedding):
    """An embedding that looks up rows of its fake-quantized table; a row is a channel."""

    float_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Return the fake-quantized rows of the indices ``input``."""
        return F.embedding(
            input, self.fake_quantized_weight(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )


class _QATConv(QATLayer):
    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` with the fake-quantized kernel."""
        output: Tensor = self._conv_forward(self._input(input), self.fake_quantized_weight(), self.bias)  # type: ignore[operator]
        return output


class QATConv1d(_QATConv, nn.Conv1d):
    """A 1-D convolution that computes with its fake-quantized kernel."""

    float_class = nn.Conv1d
    sample_dims = 2


class QATConv2d(_QATConv, nn.Conv2d):
    """A 2-D convolution that computes with its fake-quantized kernel."""

    float_class = nn.Conv2d
    sample_dims = 3


class QATConv3d(_QATConv, nn.Conv3d):
    """A 3-D convolution that computes with its fake-quantized kernel."""

    float_class = nn.Conv3d
    sample_dims = 4


def float_type(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as it is or was in float."""
    return module.float_class if isinstance(module, QATLayer) else type(module)


def is_exactly(module: nn.Module, where: str, name: str) -> bool:
    """Return whether the class of a module in float is ``name`` of the module ``where``, which is not imported."""
    return (float_type(module).__module__, float_type(module).__name__) == (where, name)


def is_hf_conv1d(module: nn.Module) -> bool:
    """Return whether a module is, or was in float, Hugging Face's ``Conv1D``."""
    return is_exactly(module, "transformers.pytorch_utils", "Conv1D")
